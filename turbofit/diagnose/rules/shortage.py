"""Bytes that were missing when TurboMind 0.15 to 0.18 died after its cache was sized.

The log says what was free, how much the cache took, which warm-up length or which images were under
way; the engine's own order of allocations (`sequence`) says at which of them it ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.struct import NA, Struct
from turbofit.core.units import MIB, format_bytes
from turbofit.diagnose.rules.padding import temporaries, weights_held
from turbofit.diagnose.rules.replay import PoolOperation, Replay, Shortfall
from turbofit.diagnose.rules.sequence import (
    EXECUTOR,
    WEIGHTS,
    first_forward_ops,
    forward_ops,
    start_ops,
)
from turbofit.diagnose.rules.settings import run_settings
from turbofit.memory.account import capability_of
from turbofit.memory.turbomind.account import FUSES_NOTHING, buffer_terms
from turbofit.memory.turbomind.pool import Forward, PoolModel
from turbofit.memory.turbomind.weights import load_constants
from turbofit.observe.log_events import (
    CacheBudget,
    Computed,
    VisionSetup,
    WarmupFinished,
    WarmupLength,
    WarmupLengths,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from turbofit.core.machine import Gpu
    from turbofit.core.model import Model
    from turbofit.core.plan import Settings
    from turbofit.diagnose.facts import LogFacts
    from turbofit.memory.turbomind.weights import EngineConstants

#: The log rounds to hundredths of a MiB.
_ROUNDING: Final = MIB // 100
#: The largest L2 of a GPU that turbofit knows (RTX PRO 6000), where the card is not known.
_UNKNOWN_L2: Final = 128 * MIB


class Shortage(Struct):
    """``at_call``: the allocation that failed. ``in_all``: what the whole step lacked, in bytes.

    ``room`` is what the executor's pool could have at most, ``left`` what the cache left. ``doubt``
    is what a real driver may take besides (kernels of the engine, steps of its pools).
    """

    at_call: Shortfall | None
    in_all: int | None
    step: str
    left: int
    room: int | None
    doubt: int
    settings: Settings
    assumed: tuple[str, ...]
    surprise: str = ""


def shortage(facts: LogFacts, model: Model, gpu: Gpu | None) -> Shortage | None:
    """What was missing, or None where the log has no line about its cache."""
    mark = facts.first(CacheBudget)
    if mark is None or not isinstance(mark.event, CacheBudget):
        return None
    budget = mark.event
    run = run_settings(facts, model, gpu)
    settings, constants = run.settings, load_constants()
    fuses = FUSES_NOTHING if gpu is None else capability_of(gpu, unknown=FUSES_NOTHING)
    pool = PoolModel(model, settings, constants, fuses)
    region = _region(budget)
    replay = Replay(
        budget.free,
        constants.pool_granularity,
        {WEIGHTS: weights_held(model, settings.tp, constants)},
        {WEIGHTS: temporaries(model, settings, constants)},
    )
    l2 = gpu.l2 if gpu is not None and gpu.l2 != NA else None
    doubt = _doubt(model, settings, gpu, constants) + (0 if l2 is not None else _UNKNOWN_L2)
    base = Shortage(
        at_call=None,
        in_all=None,
        step="",
        left=budget.free - region,
        room=None,
        doubt=doubt,
        settings=settings,
        assumed=run.assumed,
        surprise=run.contradiction,
    )
    if run.contradiction:
        return base
    return _story(facts, base, replay, pool, constants, model, region, l2 or 0)


def _story(  # noqa: PLR0913 - the facts of one sentence each
    facts: LogFacts,
    base: Shortage,
    replay: Replay,
    pool: PoolModel,
    constants: EngineConstants,
    model: Model,
    region: int,
    l2: int,
) -> Shortage:
    """Replay the start, then what was under way."""
    from msgspec.structs import replace

    start = [*start_ops(model, base.settings, pool, constants, region), *first_forward_ops(l2)]
    fault = _do(replay, start)
    if fault is not None:
        rest = sum(op.size for op in start[start.index(_failed(start, fault)) :])
        return replace(base, at_call=fault, in_all=rest - fault.left, step="the engine's buffers")
    room = replay.room(EXECUTOR)
    base = replace(base, room=room)
    if facts.first(WarmupLengths) is None:
        return replace(base, surprise="by the account its buffers fitted")
    if model.text.moe is not None:
        return replace(base, surprise="the account does not follow experts call by call")
    warming = facts.first(WarmupFinished) is None
    for step, forward in _forwards(facts, warming=warming):
        fault = _do(replay, forward_ops(pool, forward))
        if fault is not None:
            peak = _peak(pool, forward, constants.pool_granularity)
            if warming:
                longest = _longest(facts)
                whole = Forward(tokens=longest, context=longest)
                peak = max(peak, _peak(pool, whole, constants.pool_granularity))
            return replace(base, at_call=fault, in_all=peak - room, step=step)
    return replace(base, surprise=f"by the account {format_bytes(room)} should have been enough")


def _do(replay: Replay, ops: Iterable[PoolOperation]) -> Shortfall | None:
    for op in ops:
        if op.what == "trim":
            replay.trim(op.pool)
        elif fault := replay.do(op):
            return fault
    return None


def _failed(ops: list[PoolOperation], fault: Shortfall) -> PoolOperation:
    return next(op for op in ops if op.what == fault.what and op.size == fault.requested)


def _peak(pool: PoolModel, forward: Forward, step: int) -> int:
    """The executor's pool at its largest in one forward."""
    free = Replay(1 << 60, step)
    for op in forward_ops(pool, forward):
        free.do(op)
    return (1 << 60) - free.left


def _region(budget: CacheBudget) -> int:
    """The cache's bytes: the product where it rounds to what was printed."""
    product = int(budget.free * budget.ratio)
    return product if abs(product - budget.budget) <= _ROUNDING else budget.budget


def _forwards(facts: LogFacts, *, warming: bool) -> Iterator[tuple[str, Forward]]:
    """What was run: the warm-up's lengths up to the last one printed, or the last requests."""
    if warming:
        seen = dict.fromkeys(event.tokens for _, event in facts.every(WarmupLength))
        for tokens in seen:
            yield (
                f"the warm-up with {tokens} tokens",
                Forward(tokens=tokens, context=tokens),
            )
        return
    longest = _longest(facts)
    yield "the warm-up", Forward(tokens=longest, context=longest)
    # The engine prepares a step while the one before it runs: the dying one is one of the last two.
    for forward in _requests(facts)[-2:]:
        what = f"{forward.units} vision units" if forward.units else f"{forward.tokens} tokens"
        yield f"a forward with {what}", forward


def _longest(facts: LogFacts) -> int:
    """The longest warm-up request that the engine accepts."""
    mark = facts.first(WarmupLengths)
    lengths = mark.event.lengths if mark and isinstance(mark.event, WarmupLengths) else ()
    limit = facts.session_limit
    fitting = [n for n in lengths if limit is None or n <= limit]
    return max(fitting, default=0)


def _requests(facts: LogFacts) -> list[Forward]:
    """Forwards after the warm-up: the scheduler's lines of a step, then its images."""
    done = facts.first(WarmupFinished)
    after = done.line if done else 0
    steps: list[Forward] = []
    parts: dict[tuple[int, int], Computed] = {}
    previous: tuple[object, ...] = ()
    for mark in facts.marks:
        if mark.line <= after:
            continue
        if isinstance(mark.event, Computed):
            parts[mark.event.uid, mark.event.start] = mark.event
        elif isinstance(mark.event, VisionSetup):
            key = (mark.event, tuple(parts))
            if parts or key != previous:
                steps.append(_forward(parts.values(), mark.event.units))
            previous, parts = key, {}
    if parts:
        steps.append(_forward(parts.values(), 0))
    return steps


def _forward(parts: Iterable[Computed], units: int) -> Forward:
    tokens = context = 0
    for part in parts:
        tokens += part.end - part.start
        context += part.end
    return Forward(tokens=tokens, context=context, units=units)


def _doubt(model: Model, settings: Settings, gpu: Gpu | None, constants: EngineConstants) -> int:
    """What a driver may hold besides: upper ends of the account's estimates."""
    holes = int(constants.pool_growth["most"])
    if gpu is None:
        return holes + constants.kernel_modules
    terms = buffer_terms(model, settings, gpu, constants, weights=0)
    return holes + sum(term.bytes for term in terms if term.basis == "estimate")
