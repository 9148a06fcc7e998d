"""Which engine: TurboMind, where the PyTorch engine does not serve more of what was asked.

TurboMind decodes faster. But it takes more while it loads, and other memory for images, so that on
some cards only the other engine starts, or admits images whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.log import LazyLogger
from turbofit.core.plan import Plan, Remedy
from turbofit.memory.engine import Engine
from turbofit.memory.engines import ENGINES, FALLBACK, check_options, engine_for, fallback_reason
from turbofit.memory.shared_terms import capability_of
from turbofit.tuner.ask import Ask
from turbofit.tuner.engine_plan import make_plan

__all__ = ["best_plan"]

_LOG: Final = LazyLogger(__name__)

#: Triton compiles for these and newer ones; an engine that needs it is not chosen for older ones.
_LEAST_TRITON: Final = (7, 5)


def best_plan(ask: Ask, asked: str = "auto") -> Plan:
    """The best plan on the engine that was asked for, or on the one that serves more.

    Raises:
        UsageError: something asked for cannot be used here at all.
        PackageError: turbofit has no account for the engine.
    """
    reason = fallback_reason(ask.model, asked)
    if reason is not None:
        _LOG.info("engine %s: %s", FALLBACK, reason)
        from turbofit.tuner.fallback.fallback_plan import make_fallback_plan

        return make_fallback_plan(ask, reason)
    first = engine_for(ask.model, asked)
    check_options(first, ask.fixed)
    made = _planned(ask, first)
    if asked != "auto" or (_served(ask, made) == (True, True) and ask.workload.goal != "context"):
        return made
    rival = _rival(ask, made)
    _LOG.info(
        "engine %s: %s; LMDeploy's other one: %s",
        made.engine.name, made.verdict, "does not fit" if rival is None else rival.verdict,
    )  # fmt: skip
    if rival is not None and _compiles(ask) and _worth(ask, rival) > _worth(ask, made):
        return _told(rival, made)
    if made.fits:
        return made
    return replace(made, remedies=(*made.remedies, *_other_engines(ask, rival)))


def _planned(ask: Ask, engine: Engine) -> Plan:
    """The plan, with fewer engines where host memory does not do for as many as the GPUs hold."""
    made = make_plan(ask, engine)
    if not _host_short(made) or ask.replicas is not None or ask.groups is not None:
        return made
    for replicas in range(made.parallel.replicas - 1, 0, -1):
        try:
            fewer = make_plan(replace(ask, replicas=replicas), engine)
        except TurbofitError:
            continue
        if fewer.fits:
            why = f"replicas {replicas}: host memory does not do for {made.parallel.replicas}"
            reason = f"{fewer.parallel.reason}; {why}"
            parallel = replace(fewer.parallel, reason=reason)
            return replace(fewer, parallel=parallel, reasons=(why, *fewer.reasons))
    return made


def _host_short(plan: Plan) -> bool:
    host = plan.host
    return host.available is not None and host.pinned + host.pageable > host.available


def _rival(ask: Ask, made: Plan) -> Plan | None:
    """The plan on LMDeploy's other engine, None where that does not run the model or not fit."""
    for name in ENGINES[ENGINES.index(made.engine.name) + 1 :]:
        try:
            other = engine_for(ask.model, name)
            check_options(other, ask.fixed)
            plan = _planned(ask, other)
        except TurbofitError as exc:
            _LOG.debug("engine %s: %s", name, exc.message)
            continue
        return plan if plan.fits else None
    return None


def _compiles(ask: Ask) -> bool:
    """Whether Triton is sure to compile for every card."""
    return all(capability_of(gpu) >= _LEAST_TRITON for gpu in ask.visible)


def _served(ask: Ask, plan: Plan) -> tuple[bool, bool]:
    """Whether it fits, and whether it admits images as large as was asked."""
    limits = plan.limits
    return plan.fits, limits.vision_unit is None or limits.image_limit == ask.own_limit


def _worth(ask: Ask, plan: Plan) -> tuple[bool, bool, int]:
    return (*_served(ask, plan), plan.kv.tokens if ask.workload.goal == "context" else 0)


def _told(won: Plan, lost: Plan) -> Plan:
    """The better plan, with the other's row and the reason."""
    row = lost.considered[0]
    if not lost.fits:
        why = f"{lost.engine.name} {lost.verdict}"
    elif lost.limits.units_per_image < won.limits.units_per_image:
        why = (
            f"{lost.engine.name} serves images of {lost.limits.units_per_image:,}"
            f" {won.limits.vision_unit}s at most, this one of {won.limits.units_per_image:,}"
        )
    else:
        why = f"{lost.engine.name} holds {lost.kv.tokens:,} KV tokens, fewer than this"
    return replace(
        won,
        considered=(
            won.considered[0],
            replace(row, why_not=row.why_not or why),
            *won.considered[1:],
        ),
        reasons=(f"engine {won.engine.name}: {why}", *won.reasons),
    )


def _other_engines(ask: Ask, rival: Plan | None) -> Iterator[Remedy]:
    """Engines that would serve, and why they are not chosen."""
    if rival is not None:
        yield Remedy(
            change=f"--engine {rival.engine.name}",
            effect=f"fits: {rival.kv.tokens:,} KV tokens, if its Triton still compiles for a card"
            " as old as this",
        )
    try:
        from turbofit.tuner.fallback.fallback_plan import make_fallback_plan

        reason = fallback_reason(ask.model, FALLBACK) or ""
        whole = make_fallback_plan(replace(ask, fixed={}), reason)
    except TurbofitError:  # Transformers does not run it, or not so
        return
    if whole.fits:
        yield Remedy(
            change=f"--engine {FALLBACK}", effect="fits: one request at a time, and slower"
        )
