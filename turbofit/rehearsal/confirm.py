"""Rehearses a plan with the real engine on pretend GPUs, and corrects the plan by the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from turbofit.core.engine_end import Rehearsal
from turbofit.core.errors import UsageError
from turbofit.core.plan import EnginePlan, GpuLedger, Plan, Term, alike
from turbofit.core.process.log import LazyLogger
from turbofit.core.process.progress import under_way
from turbofit.core.process.signals import ended_like_ctrl_c
from turbofit.core.units import format_bytes
from turbofit.memory.account import POOL_WARMUP, RATIO_STEPS
from turbofit.planning.plan import finished
from turbofit.planning.request import PlanRequest
from turbofit.planning.resolve import model_of
from turbofit.planning.tuned import same_shape
from turbofit.rehearsal.checkpoint.twin import need_stand_in
from turbofit.rehearsal.planned import rehearsed_engine

_LOG: Final = LazyLogger(__name__)

#: The most rehearsals of one plan: one, and two more after corrections.
_REHEARSALS: Final = 3
_UNSETTLED: Final = (
    f"not rehearsed: each of {_REHEARSALS} rehearsals left less than the margin; the ratio is lower"
    " than in the last rehearsal"
)


def refuse_untwinned(request: PlanRequest) -> None:
    """Refuse a request if the model's weights are not on disk and the model has no twin.

    Call this function before the model is planned.

    Raises:
        UsageError: no twin of the model can be made.
    """
    need_stand_in(model_of(request))


def rehearsed(request: PlanRequest, plan: Plan) -> Plan:
    """Rehearse a plan; lower its ratios if the engine leaves less memory free than the margin.

    If the user gives no margin, the plan may have the smaller margin of a rehearsed plan
    (`Margin`). If the last rehearsal still leaves too little, the plan is made anew with the whole
    margin, and has a warning. A plan that does not fit stays unchanged.

    Raises:
        UsageError: the plan is for Transformers.
        PackageError: LMDeploy or a C compiler is missing.
    """
    if not plan.backend.of_lmdeploy:
        raise UsageError(
            f"{plan.model.name} is planned for Transformers: it has no ratio to correct",
            hint="turbofit rehearse MODEL --engine transformers shows how much memory it takes",
        )
    if not plan.fits:
        return plan
    original_request = request
    request = request.changed(model=plan.model, revision=None, on=plan.machine, gpus=None)
    ratios: dict[int, float] = {}
    unrehearsed = plan
    if request.margin is None:
        with_small_margin = same_shape(request, plan, {}, rehearsed=True)
        plan = with_small_margin if with_small_margin.fits else plan
    for _ in range(_REHEARSALS):
        result = rehearse_plan(plan)
        if not ratios and result.rehearsal is not None and result.rehearsal.outcome == "failed":
            # The rehearsal itself failed, so it says nothing about the plan.
            failed = with_rehearsals(unrehearsed, result.engines)
            return finished(replace(failed, fits=False, verdict=result.verdict), original_request)
        lower_ratios = corrected_ratios(result)
        if not lower_ratios:
            return finished(confirmed(result), original_request)
        ratios |= lower_ratios
        _LOG.info(
            "the rehearsal leaves less than the margin: ratios by GPU become %s", lower_ratios
        )
        plan = same_shape(request, plan, ratios, rehearsed=True)
        if not plan.fits:
            return finished(plan, original_request)
    if not result.fits:
        return finished(result, original_request)
    # Nobody has rehearsed the last plan, so this plan has the whole margin.
    last = same_shape(request, plan, ratios)
    if last.fits:
        last = replace(last, warnings=(*last.warnings, _UNSETTLED))
    return finished(last, original_request)


def rehearse_plan(plan: Plan, keep: Path | None = None) -> Plan:
    """Rehearse a plan; return the plan with the memory that the engine took in the worst cases.

    If several groups have equal settings, only the first of these groups is rehearsed. If the
    rehearsal contradicts the forecast, ``fits`` and ``verdict`` follow the rehearsal. ``keep`` is a
    folder for timelines, notes and log. If settings differ, each group has a subfolder.

    Raises:
        PackageError: LMDeploy or a C compiler is missing.
        UsageError: the model's own checkpoint is needed, and it is not on disk.
    """
    engines, equal_engines = [*plan.engines], alike(plan.engines)
    for numbers in equal_engines:
        first = numbers[0]
        folder = keep / f"group-{first}" if keep and len(equal_engines) > 1 else keep
        with ended_like_ctrl_c(), under_way("rehearsing on pretend GPUs"):
            engines[first] = rehearsed_engine(plan, first, folder)
        for number in numbers[1:]:
            engines[number] = replace(engines[number], rehearsal=engines[first].rehearsal)
    rehearsed_plan = replace(plan, engines=tuple(engines))
    worst = rehearsed_plan.rehearsal
    if worst is None:
        return rehearsed_plan
    _LOG.info("%s rehearsed: %s, %s", plan.model.name, worst.outcome, worst.death)
    if worst.outcome == "served" or not plan.fits:
        return rehearsed_plan
    ended = with_rehearsals(plan, engines)
    return replace(ended, fits=False, verdict=_contradiction(plan, worst), serve=None)


def with_rehearsals(plan: Plan, rehearsed: Sequence[EnginePlan]) -> Plan:
    """Return the plan with the results of the rehearsed engines; the plan's forecasts stay."""
    engines = zip(plan.engines, rehearsed, strict=True)
    return replace(
        plan, engines=tuple(replace(was, rehearsal=now.rehearsal) for was, now in engines)
    )


def corrected_ratios(rehearsed: Plan) -> dict[int, float]:
    """Return the ratios that must be lowered, by GPU index.

    Engines with equal settings get the ratio of the rehearsed engine among them.
    """
    ratios: dict[int, float] = {}
    for numbers in alike(rehearsed.engines):
        ratio = corrected_ratio(rehearsed.engines[numbers[0]])
        if ratio is None:
            continue
        for number in numbers:
            ratios |= dict.fromkeys(rehearsed.groups[number], ratio)
    return ratios


def corrected_ratio(rehearsed: EnginePlan) -> float | None:
    """Return the largest ratio at which the rehearsed GPUs keep the margin; None for no change.

    A term counts with its rehearsed bytes if a counter measured them. A worst case counts with the
    larger of forecast and rehearsal, since the rehearsal may have missed the worst moment.
    """
    rehearsal = rehearsed.rehearsal
    if rehearsal is None or rehearsal.outcome not in ("served", "out_of_memory"):
        return None
    missing = max(_shortfall(ledger) for ledger in rehearsed.ledgers)
    if rehearsal.death is not None:
        missing = max(1, (rehearsal.death.asked or 0) - (rehearsal.death.left or 0))
    if missing <= 0:
        return None
    free = min((f for f in rehearsal.cache.free if f is not None), default=0)
    # The fewest steps by which the ratio must fall to free the missing bytes.
    steps = -(-missing * RATIO_STEPS // free) if free > 0 else 1
    ratio = round(rehearsed.settings.cache_max_entry_count * RATIO_STEPS)
    return max(1, ratio - steps) / RATIO_STEPS


def _shortfall(ledger: GpuLedger) -> int:
    """Return the bytes by which a rehearsed GPU misses its margin.

    The result is 0 or less if the GPU keeps the margin.
    """
    steady, pool, worst = 0, 0, 0
    for term in ledger.terms:
        size = term.bytes if term.rehearsed is None else term.rehearsed
        if term.phase == "transient":
            worst = max(worst, term.bytes, size)
        elif term.term == POOL_WARMUP:
            pool = size
        else:
            steady += size
    return steady + max(pool, worst) - (ledger.usable - ledger.margin)


def confirmed(plan: Plan) -> Plan:
    """Return the plan with the basis "rehearsed" for each term that the rehearsal measured.

    Terms of worst cases keep their basis.
    """

    def based(term: Term) -> Term:
        if term.rehearsed is None or term.phase == "transient":
            return term
        return replace(term, basis="rehearsed")

    def based_ledger(ledger: GpuLedger) -> GpuLedger:
        return replace(ledger, terms=tuple(map(based, ledger.terms)))

    engines = (
        replace(engine, ledgers=tuple(map(based_ledger, engine.ledgers))) for engine in plan.engines
    )
    return replace(plan, engines=tuple(engines))


def _contradiction(plan: Plan, rehearsal: Rehearsal) -> str:
    """Return the verdict of a plan that fits by forecast, but whose engine did not serve."""
    death, allocation = rehearsal.death, ""
    if death is None:
        return f"{plan.model.name}: the rehearsal ended in {rehearsal.outcome}"
    if death.asked is not None and death.left is not None:
        allocation = (
            f", asking {format_bytes(death.asked)} where {format_bytes(death.left)} were left"
        )
    return (
        f"{plan.model.name}: the forecast fits, but the engine on pretend GPUs did not serve:"
        f" {rehearsal.outcome} in {death.phase} ({death.where}){allocation}"
    )
