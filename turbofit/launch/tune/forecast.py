"""What the model of speed says of a plan under a load."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from turbofit.core.errors import TurbofitError
from turbofit.core.tuning import TrialForecast
from turbofit.load.trace import read_trace
from turbofit.memory.account import NO_IMAGES, VisionLoad
from turbofit.memory.engines import engine_named
from turbofit.planning.plan import plan as best_plan
from turbofit.tuner.speed import BatchLimits, ClosedLoad, group_rates, rates, speed_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.plan import Plan
    from turbofit.load.spec import LoadSpec
    from turbofit.planning.request import PlanRequest

__all__ = ["MeanRequest", "SmallerLimit", "forecast_of", "mean_request", "smaller_limit"]


class MeanRequest(NamedTuple):
    """A load's request on average; ``images`` are the sizes of one, or of several alike."""

    text_tokens: int
    output_tokens: int
    images: tuple[tuple[int, int], ...]


def mean_request(spec: LoadSpec) -> MeanRequest:
    """The request of a load; of a trace its mean, and the images of the request in its middle.

    Raises:
        UsageError: the trace cannot be read.
    """
    if spec.trace is None:
        size = max(spec.image_size, key=lambda one: one[0] * one[1])
        return MeanRequest(spec.prompt_tokens, spec.output_tokens, (size,) * spec.images)
    trace = read_trace(spec.trace)
    by_images = sorted(trace, key=lambda one: sum(w * h for w, h in one.images))
    return MeanRequest(
        _mean([one.text_tokens for one in trace]),
        _mean([one.output_tokens for one in trace]),
        by_images[len(by_images) // 2].images,
    )


def forecast_of(plan: Plan, request: MeanRequest, at_once: float) -> TrialForecast:
    """Of all engines of a plan, with so many requests at once in all."""
    engine, images = engine_named(plan.engine.name), _vision_load(plan, request)
    load = ClosedLoad(
        prompt=request.text_tokens + images.tokens_per_request,
        output=request.output_tokens,
        at_once=at_once / len(plan.parallel.groups),
        images=images,
    )
    rate, ttft, tpot = 0.0, 0.0, 0.0
    for group, one in zip(plan.parallel.groups, plan.each(), strict=True):
        settings, gpus = one.settings, [plan.machine.gpu(index) for index in group]
        here = group_rates(plan.model, settings, plan.machine, gpus, engine)
        speed = speed_of(here, rates(), load, BatchLimits.of(settings, one.kv.tokens))
        rate += speed.requests_per_second
        ttft = max(ttft, speed.seconds_to_first_token)
        # A row waits for the prefills of others between its steps.
        taken = speed.running / max(speed.requests_per_second, 1e-9) - speed.prefill
        tpot = max(tpot, taken / request.output_tokens, speed.step)
    return TrialForecast(requests_per_second=rate, ttft=ttft, tpot=tpot)


def _vision_load(plan: Plan, request: MeanRequest) -> VisionLoad:
    rule, limit = plan.model.image_rule, plan.limits.image_limit
    if rule is None or not request.images:
        return NO_IMAGES
    units = [rule.units(width, height, limit) for width, height in request.images]
    return VisionLoad(
        units_per_image=max(units),
        images_per_request=len(units),
        tokens_per_request=sum(rule.unit_tokens(one) for one in units),
    )


def _mean(values: Sequence[int]) -> int:
    return max(1, round(sum(values) / max(1, len(values))))


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
