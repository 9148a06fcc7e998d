"""Bytes that were missing when TurboMind 0.15 to 0.18 died after its cache was sized.

The log says what was free, how much the cache took, which warm-up length or which images were under
way; turbofit's account says what the engine's buffers and each such forward take.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.machine import Gpu
from turbofit.core.struct import NA, Struct, known
from turbofit.core.units import MIB, format_bytes, round_up
from turbofit.diagnose.rules.settings import run_settings
from turbofit.memory.account import capability_of
from turbofit.memory.turbomind.account import FUSES_NOTHING, buffer_terms
from turbofit.memory.turbomind.pool import Forward, PoolModel
from turbofit.memory.turbomind.weights import load_constants, temporary_bytes, weight_classes
from turbofit.observe.log_events import (
    CacheBudget,
    Computed,
    VisionSetup,
    WarmupFinished,
    WarmupLengths,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from turbofit.core.model import Model
    from turbofit.core.plan import Settings
    from turbofit.diagnose.facts import LogFacts

#: The log rounds to hundredths of a MiB.
_ROUNDING: Final = MIB // 100
#: The largest L2 of a GPU that turbofit knows (RTX PRO 6000), where the card is not known.
_UNKNOWN_L2: Final = 128 * MIB
#: Terms of the account that are taken at last.
_WORKSPACES: Final = ("gemm_workspace", "delta_workspace", "l2_flush")
_UNKNOWN_CARD: Final = Gpu(index=0, uuid="", name="", total=NA, reserved=NA, used=NA, free=NA)


class Shortage(Struct):
    """``step`` needed ``needed`` bytes where ``room`` were left; no step: none lacks any.

    ``left`` is what the cache left, before buffers. ``doubt`` is what a real driver may take
    besides (kernels of the engine, holes in its pools).
    """

    left: int
    doubt: int
    settings: Settings
    assumed: tuple[str, ...]
    step: str = ""
    needed: int = 0
    room: int = 0
    surprise: str = ""

    @property
    def lacked(self) -> int:
        """Bytes that ``step`` needed beyond what was left."""
        return self.needed - self.room


def shortage_of(facts: LogFacts, model: Model, gpu: Gpu | None) -> Shortage | None:
    """What was missing, or None where the log has no line about its cache."""
    mark = facts.first(CacheBudget)
    if mark is None or not isinstance(mark.event, CacheBudget):
        return None
    run = run_settings(facts, model, gpu)
    settings, constants = run.settings, load_constants()
    card = gpu or _UNKNOWN_CARD
    capability, granularity = capability_of(card, unknown=FUSES_NOTHING), constants.pool_granularity
    doubt = int(constants.pool_growth["most"]) + (_UNKNOWN_L2 if card.l2 == NA else 0)
    weights = sum(weight_classes(model, settings.tp, constants, capability).values())
    card = replace(card, l2=known(card.l2, 0))
    terms = buffer_terms(model, settings, card, constants, weights)
    left = mark.event.free - _region(mark.event)
    shortage = Shortage(
        left=left,
        doubt=doubt + sum(term.bytes for term in terms if term.basis == "estimate"),
        settings=settings,
        assumed=run.assumed,
        surprise=run.contradiction,
    )
    if run.contradiction:
        return shortage
    sizes = {term.term: term.bytes for term in terms if term.basis != "estimate"}
    buffers = sum(sizes.values())
    temporaries = temporary_bytes(model, settings, constants, capability)
    # Of loading; the engine gives it back between its buffers and its workspaces.
    freed = round_up(weights + temporaries, granularity) - round_up(weights, granularity)
    room = left + freed
    early = buffers - sum(sizes.get(name, 0) for name in _WORKSPACES)
    if facts.first(WarmupLengths) is None:
        stages = ((early, left), (buffers, room))
        needed, free = max(stages, key=lambda stage: stage[0] - stage[1])
        if needed <= free:
            return replace(shortage, surprise="by the account its buffers fitted")
        return replace(shortage, step="the engine's buffers", needed=needed, room=free)
    # The buffers were there: what they lack by the account, a warm-up or a request lacks.
    beyond, room = max(0, buffers - room), max(0, room - buffers)
    pool = PoolModel(model, settings, constants, capability)
    forwards = list(_forwards(facts))
    for name, forward in forwards:
        needed = round_up(pool.peak(forward), granularity) + beyond
        if needed > room:
            return replace(shortage, step=name, needed=needed, room=room)
    surprise = "no line tells what ran when it died"
    if forwards:
        surprise = f"by the account {format_bytes(room)} should have been enough"
    return replace(shortage, surprise=surprise)


def _region(budget: CacheBudget) -> int:
    """The cache's bytes: the product where it rounds to what was printed."""
    product = int(budget.free * budget.ratio)
    return product if abs(product - budget.budget) <= _ROUNDING else budget.budget


def _forwards(facts: LogFacts) -> Iterator[tuple[str, Forward]]:
    """What was run: the warm-up's longest request, or the last requests after it."""
    longest = facts.longest_warmup
    if longest and facts.first(WarmupFinished) is None:
        warmup = Forward(tokens=longest, context=longest, first_layer=True)
        yield f"the warm-up with {longest} tokens", warmup
    # The engine prepares a step while the one before it runs: the dying one is one of the last two.
    for forward in _requests(facts)[-2:]:
        what = f"{forward.units} vision units" if forward.units else f"{forward.tokens} tokens"
        yield f"a forward with {what}", forward


def _requests(facts: LogFacts) -> list[Forward]:
    """Forwards after the warm-up: the scheduler's lines of a step, then its images."""
    done = facts.first(WarmupFinished)
    if done is None:
        return []
    steps: list[Forward] = []
    parts: dict[tuple[int, int], Computed] = {}
    previous: tuple[object, ...] = ()
    for mark in facts.marks:
        if mark.line <= done.line:
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
