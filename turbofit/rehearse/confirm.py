"""Rehearses a plan with the real engine on pretend GPUs, and corrects it by what was seen."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from msgspec import convert
from msgspec.structs import replace

from turbofit.core.plan import (
    End,
    GpuLedger,
    Moment,
    Plan,
    Rehearsal,
    RehearsedCache,
    RehearsedCase,
    Term,
)
from turbofit.core.process.log import LazyLogger
from turbofit.core.process.progress import under_way
from turbofit.core.process.signals import ended_like_ctrl_c
from turbofit.core.units import format_bytes
from turbofit.memory.shared_terms import POOL_WARMUP
from turbofit.rehearse.checkpoint.twin import checkpoint_for
from turbofit.rehearse.turbomind.planned import plan_spec, rehearsed_ledgers, unanswered
from turbofit.rehearse.turbomind.probe import rehearse

__all__ = ["confirmed", "corrected_ratio", "corrected_ratios", "rehearse_plan"]

_LOG: Final = LazyLogger(__name__)

_STEPS = 1000
#: Outcomes, the one that a plan goes by first.
_GRAVE = ("out_of_memory", "hang", "failed", "served")


def rehearse_plan(plan: Plan) -> Plan:
    """The plan with what the engine did in its worst cases.

    It is the first group of GPUs that is rehearsed; where groups run settings of their own, the
    first of each, one after the other. ``fits`` and ``verdict`` are the rehearsal's where it
    contradicts the forecast.

    Raises:
        PackageError: LMDeploy or a C compiler is missing.
        UsageError: only the model's own checkpoint would do, and it is not on disk.
    """
    if not plan.by_group:
        return _with_verdict(plan, _rehearsed(plan, 0))
    rehearsed = {numbers: _rehearsed(plan, numbers[0]) for numbers in plan.unlike_groups()}
    ledgers = {ledger.index: ledger for one in rehearsed.values() for ledger in one.gpus}
    ends = {number: one.rehearsal for numbers, one in rehearsed.items() for number in numbers}
    # What tells of memory comes before a rehearsal that could not be held.
    found = [one for one in ends.values() if one is not None]
    worst = min(found, key=lambda one: _GRAVE.index(one.outcome), default=None)
    whole = replace(
        plan,
        gpus=tuple(ledgers.get(gpu.index, gpu) for gpu in plan.gpus),
        rehearsal=worst,
        by_group=tuple(
            replace(group_plan, rehearsal=ends[number])
            for number, group_plan in enumerate(plan.by_group)
        ),
    )
    return _with_verdict(plan, whole)


def _rehearsed(plan: Plan, group: int) -> Plan:
    """One group's view of the plan, with what its engine did."""
    with ended_like_ctrl_c(), under_way("rehearsing on pretend GPUs"):
        return _run(plan.of_group(group), group)


def _run(plan: Plan, group: int) -> Plan:
    if plan.engine.on_torch:
        from turbofit.rehearse.torch.torch_planned import rehearse_pytorch_plan

        return rehearse_pytorch_plan(plan, group)
    with tempfile.TemporaryDirectory(prefix="turbofit-rehearsal-") as scratch:
        # Chat templates are chosen by the folder's name, so the twin keeps the model's.
        checkpoint = checkpoint_for(plan.model, Path(scratch) / plan.model.name)
        document = rehearse(plan_spec(plan, checkpoint, group))
    rehearsal = _rehearsal(document)
    refused = unanswered(plan, document) if rehearsal.outcome == "served" else None
    if refused is not None:
        rehearsal = replace(rehearsal, outcome="failed", death=refused)
    served = rehearsal.outcome == "served"
    gpus = rehearsed_ledgers(plan, document, group) if served else plan.gpus
    return replace(plan, gpus=gpus, rehearsal=rehearsal)


def _with_verdict(plan: Plan, rehearsed: Plan) -> Plan:
    """Where the engine did not serve what the forecast fits, the engine is right."""
    rehearsal = rehearsed.rehearsal
    if rehearsal is not None:
        _LOG.info("%s rehearsed: %s, %s", plan.model.name, rehearsal.outcome, rehearsal.death)
    if rehearsal is None or rehearsal.outcome == "served" or not plan.fits:
        return rehearsed
    verdict = _contradiction(plan, rehearsal)
    return replace(rehearsed, gpus=plan.gpus, fits=False, verdict=verdict, serve=None)


def corrected_ratios(rehearsed: Plan) -> dict[int, float]:
    """The ratios that must be lowered, by the indices of their GPUs; empty where none must.

    A group that was not rehearsed itself gets what the one like it gets.
    """
    found: dict[int, float] = {}
    for numbers in rehearsed.unlike_groups():
        ratio = corrected_ratio(rehearsed.of_group(numbers[0]))
        if ratio is None:
            continue
        for number in numbers:
            found |= dict.fromkeys(rehearsed.parallel.groups[number], ratio)
    return found


def corrected_ratio(rehearsed: Plan) -> float | None:
    """The largest ratio that the rehearsal's figures leave the margin for; None: as it is.

    The engine's own figures count where they are known, and the larger of forecast and rehearsal
    for the worst cases: the rehearsal may not have reached the worst of a case.
    """
    rehearsal = rehearsed.rehearsal
    if rehearsal is None:
        return None
    ratio = rehearsed.settings.cache_max_entry_count
    if rehearsal.outcome == "out_of_memory" and rehearsal.death is not None:
        death = rehearsal.death
        missing = (death.asked or 0) - (death.left or 0)
        free = min((f for f in rehearsal.cache.free if f is not None), default=0)
        steps = -(-missing * _STEPS // free) if free > 0 else 1
        return max(1, round(ratio * _STEPS) - max(1, steps)) / _STEPS
    if rehearsal.outcome != "served":
        return None
    worse = max(_shortfall(ledger) for ledger in rehearsed.gpus)
    if worse <= 0:
        return None
    free = min(f for f in rehearsal.cache.free if f is not None)
    return max(1, round(ratio * _STEPS) - -(-worse * _STEPS // free)) / _STEPS


def _shortfall(ledger: GpuLedger) -> int:
    """Bytes by which a rehearsed GPU misses its margin; 0 or less where it keeps it."""
    body = [_seen(t) for t in ledger.ledger if t.phase != "transient"]
    pool = next((_seen(t) for t in ledger.ledger if t.term == POOL_WARMUP), 0)
    worst = max((_larger(t) for t in ledger.ledger if t.phase == "transient"), default=0)
    peak = sum(body) - pool + max(pool, worst)
    return peak - (ledger.total - ledger.reserved - ledger.margin)


def _seen(term: Term) -> int:
    return term.bytes if term.rehearsed is None else term.rehearsed


def _larger(term: Term) -> int:
    return max(term.bytes, term.rehearsed or 0)


def confirmed(plan: Plan) -> Plan:
    """The terms, marked as rehearsed where the rehearsal agrees with them."""

    def based(term: Term) -> Term:
        if term.rehearsed is None or term.phase == "transient":
            return term
        return replace(term, basis="rehearsed")

    gpus = tuple(
        replace(gpu, ledger=tuple(based(term) for term in gpu.ledger)) for gpu in plan.gpus
    )
    return replace(plan, gpus=gpus)


def _rehearsal(document: Mapping[str, Any]) -> Rehearsal:
    """The contract's summary of the probe's document."""
    return Rehearsal(
        outcome=document["outcome"],
        seconds=document["seconds"],
        engine_version=document["engine_version"],
        cases=tuple(
            RehearsedCase(
                name=case["name"],
                peak=tuple(case["peak"]),
                transient=tuple(card["live_peak"] for card in case["executor"]),
                pinned=case["pinned"],
            )
            for case in document["cases"]
        ),
        cache=convert(document["cache"], RehearsedCache),
        death=convert(document["death"], End | None),
        not_known=tuple(document["not_known"]),
        timeline=convert(document["timeline"], tuple[Moment, ...]),
    )


def _contradiction(plan: Plan, rehearsal: Rehearsal) -> str:
    death = rehearsal.death
    if death is None:
        return f"{plan.model.name}: the rehearsal ended in {rehearsal.outcome}"
    allocation = ""
    if death.asked is not None and death.left is not None:
        allocation = (
            f", asking {format_bytes(death.asked)} where {format_bytes(death.left)} were left"
        )
    return (
        f"{plan.model.name}: the forecast fits, but the engine on pretend GPUs did not serve:"
        f" {rehearsal.outcome} in {death.phase} ({death.where}){allocation}"
    )
