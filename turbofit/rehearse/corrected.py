"""Rehearses a plan, and plans again with a smaller ratio where the engine left too little."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.process.log import LazyLogger
from turbofit.memory.engines import engine_named
from turbofit.planning.plan import finished
from turbofit.planning.resolve import resolve
from turbofit.planning.tuned import pinned, still_tuned
from turbofit.rehearse.confirm import confirmed, corrected_ratios, rehearse_plan
from turbofit.tuner.engine_plan import make_plan

if TYPE_CHECKING:
    from turbofit.core.plan import Plan
    from turbofit.planning.request import PlanRequest

__all__ = ["check_rehearsable", "rehearsed"]

_LOG: Final = LazyLogger(__name__)

#: Rehearsals of one plan at most: the first, and two after a correction.
_REHEARSALS: Final = 3
_UNSETTLED: Final = (
    f"not rehearsed: each of {_REHEARSALS} rehearsals left less than the margin; the ratio is below"
    " the last one's"
)


def rehearsed(request: PlanRequest, plan: Plan) -> Plan:
    """The plan after its rehearsal, at lower ratios where the engine left less than the margin.

    The margin is smaller than that of a plan that was not rehearsed, where nobody asked for one:
    a rehearsal removes doubts that the larger margin pays for. Where even the last rehearsal leaves
    less, the plan below it has the whole margin, and says that it was not rehearsed.

    Args:
        request: what the plan was made for.
        plan: the best plan; one that does not fit is given back as it is.

    Raises:
        UsageError: the plan is for Transformers.
        PackageError: LMDeploy or a C compiler is missing.
    """
    check_rehearsable(plan)
    if not plan.fits:
        return plan
    given = request
    request = request.changed(model=plan.model, revision=None, on=plan.machine, gpus=None)
    ratios: dict[int, float] = {}
    cautious, plan = plan, _with_less_margin(request, plan)
    for _ in range(_REHEARSALS):
        seen = rehearse_plan(plan)
        if not ratios and seen.rehearsal is not None and seen.rehearsal.outcome == "failed":
            # It could not be held, and so settles nothing.
            why = seen.rehearsal
            return finished(
                replace(cautious, fits=False, verdict=seen.verdict, rehearsal=why), given
            )
        lower = corrected_ratios(seen)
        if not lower:
            return finished(confirmed(seen), given)
        ratios |= lower
        _LOG.info("the rehearsal leaves less than the margin: ratios by GPU become %s", lower)
        plan = _again(request, plan, ratios)
        if not plan.fits:
            return finished(plan, given)
    return finished(_unsettled(request, plan, ratios) if seen.fits else seen, given)


def _with_less_margin(request: PlanRequest, plan: Plan) -> Plan:
    """The plan with the margin of one that was rehearsed; itself where a person chose it."""
    if request.margin is not None:
        return plan
    wider = _again(request, plan, {})
    return wider if wider.fits else plan


def _unsettled(request: PlanRequest, plan: Plan, ratios: dict[int, float]) -> Plan:
    """The plan below the last rehearsal's ratios, which no rehearsal has seen."""
    made = _again(request, plan, ratios, rehearsed=False)
    return replace(made, warnings=(*made.warnings, _UNSETTLED)) if made.fits else made


def _again(
    request: PlanRequest, plan: Plan, ratios: dict[int, float], *, rehearsed: bool = True
) -> Plan:
    """The same shape under largest ratios; with the smaller margin of one that was rehearsed."""
    resolved = resolve(pinned(request, plan))
    shape = replace(
        resolved,
        ratio_caps=dict(ratios),
        groups=plan.parallel.groups,
        margin=replace(resolved.margin, rehearsed=rehearsed),
    )
    again = make_plan(shape, engine_named(plan.engine.name))
    again = replace(again, parallel=replace(again.parallel, reason=plan.parallel.reason))
    return still_tuned(again, plan)


def check_rehearsable(plan: Plan) -> None:
    """Refuse a plan that no rehearsal is for.

    Raises:
        UsageError: it is for Transformers.
    """
    if not plan.engine.of_lmdeploy:
        raise UsageError(
            f"{plan.model.name} is planned for Transformers, whose plans are not rehearsed",
            hint="turbofit rehearse MODEL --engine transformers runs its worst case alone",
        )
