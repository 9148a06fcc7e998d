"""What a smaller image limit would gain for a load whose images do not need the plan's limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from turbofit.core.errors import TurbofitError
from turbofit.launch.tune.forecast import MeanRequest, forecast_of
from turbofit.load.trace import read_trace
from turbofit.planning.plan import plan as best_plan

if TYPE_CHECKING:
    from turbofit.core.plan import Plan
    from turbofit.load.spec import LoadSpec
    from turbofit.planning.request import PlanRequest

__all__ = ["SmallerLimit", "smaller_limit"]

#: A gain of less than this share is not worth a smaller promise.
_LEAST_GAIN = 0.05


class SmallerLimit(NamedTuple):
    """An image limit under which every image of a load stays as it is; requests a second."""

    option: str
    forecast: float
    without: float

    def __str__(self) -> str:
        return (
            f"the load's images need no more than {self.option}: with it the forecast is"
            f" {self.forecast:.2f} requests/s instead of {self.without:.2f}"
        )


def smaller_limit(
    request: PlanRequest, usual: Plan, spec: LoadSpec, mean: MeanRequest, at_once: float
) -> SmallerLimit | None:
    """The smallest common limit that changes no image of the load, where the forecast gains by it.

    A smaller limit is a smaller promise, so that it is only offered.

    Args:
        request: what the person asked; a limit that is given in it is not changed.
        usual: the plan for it.
        spec: the load.
        mean: the load's request on average.
        at_once: the load's requests under way.
    """
    rule, limit, sizes = usual.model.image_rule, usual.limits.image_limit, _sizes(spec)
    if rule is None or limit is None or not sizes or not rule.varies_by_limit:
        return None
    if {rule.limit_name, "image_size"} & set(request.given()):
        return None

    def units(at: int) -> list[int]:
        return [rule.units(width, height, at) for width, height in sizes]

    whole = units(limit)
    enough = [one for one in rule.common_limits if one < limit and units(one) == whole]
    if not enough:
        return None
    try:
        plan = best_plan(request.changed(**{rule.limit_name: min(enough)}))
    except TurbofitError:
        return None
    before, after = (forecast_of(one, mean, at_once).requests_per_second for one in (usual, plan))
    if not plan.fits or after < before * (1 + _LEAST_GAIN):
        return None
    return SmallerLimit(f"{rule.limit_option} {min(enough)}", after, before)


def _sizes(spec: LoadSpec) -> set[tuple[int, int]]:
    """Width and height of every image that the load sends."""
    if spec.trace is None:
        return set(spec.image_size) if spec.images else set()
    return {size for one in read_trace(spec.trace) for size in one.images}
