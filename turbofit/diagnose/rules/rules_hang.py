"""Hangs: a warm-up whose cache is smaller than its request, a server that makes no token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.messages import plural
from turbofit.core.struct import Struct
from turbofit.core.units import format_bytes
from turbofit.diagnose.answer import Missing
from turbofit.diagnose.rules.draft import RuleAnswer, evidence
from turbofit.observe.log_events import (
    CacheBudget,
    CheckFailed,
    CudaError,
    ServerFigures,
    ServerUp,
    Slab,
    WarmupFinished,
    WarmupLength,
    WarmupLengths,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.event import LogEvent
    from turbofit.diagnose.facts import LogFacts

_DEFAULT_BLOCK: Final = 64
_WAITS: Final = (
    "the warm-up sends one request as long as a forward; while the cache has fewer blocks than it"
    " needs, the scheduler tries again for ever, without an error"
)
_HANGS: Final = "LMDeploy hangs in its warm-up for ever: its cache cannot hold one warm-up request"


def hang_rules(case: LogCase) -> Iterator[RuleAnswer]:
    """A warm-up that waits, with or without the lines that say so; a server that stands still."""
    facts = case.facts
    yield from _stands_still(case)
    over = (WarmupFinished, ServerUp, CudaError, CheckFailed)
    if any(isinstance(mark.event, over) for mark in facts.marks):
        return
    slab = facts.first(Slab)
    if facts.waiting:
        yield _hang(facts, facts.waiting)
    elif slab and isinstance(facts.marks[-1].event, Slab | CacheBudget):
        yield _silence(slab)


def _stands_still(case: LogCase) -> Iterator[RuleAnswer]:
    """LMDeploy's last count of a log: requests run, and no token came in ten seconds."""
    counted = case.facts.every(ServerFigures)
    if not counted or case.event.outcome == "fatal":
        return
    mark, figures = counted[-1]
    if not figures.running or figures.made != 0.0:
        return
    still = 0
    for _, before in reversed(counted):
        if not before.running or before.made != 0.0:
            break
        still += 1
    yield RuleAnswer(
        kind="stands_still",
        line=mark.line,
        rank="consequence",
        what=f"no line of this log tells of an error, and where it ends {figures.running}"
        f" {plural(figures.running, 'request')} run and no token came for {10 * still} seconds:"
        " the engine stands still, or reads a long prompt",
        evidence=(evidence(mark, "LMDeploy's own count, which it prints every ten seconds"),),
    )


def _hang(facts: LogFacts, waiting: LogEvent) -> RuleAnswer:
    waits = f"nothing can be admitted; {facts.waits:,} such lines to the log's end"
    lines = [evidence(waiting, waits)]
    figures = _blocks(facts)
    missing = None
    tells: dict[type[Struct], str] = {}
    if figures:
        missing = Missing(
            bytes=(figures.needed - figures.available) * figures.block,
            basis="formula",
            note=f"of cache: it holds {figures.available} blocks of {format_bytes(figures.block)},"
            f" one warm-up request needs {figures.needed}",
            doubt=figures.spread * figures.block,
        )
        tells = {CacheBudget: "the cache's size", Slab: "the size of a block"}
    tells[WarmupLengths] = "the lengths of the warm-up"
    lines += [evidence(mark, tells[kind]) for kind in tells if (mark := facts.first(kind))]
    return RuleAnswer(
        kind="start_hang",
        phase="start-up hang",
        what=_HANGS if figures else "",
        line=waiting.line,
        possible=(_WAITS,),
        why=(_WAITS,) if figures else (),
        missing=missing,
        evidence=tuple(sorted(lines, key=lambda row: row.line)),
        changes=_changes(facts, figures),
        planned=True,
    )


class _Blocks(Struct):
    """KV blocks available and needed, bytes of one, and how many an unaligned start may cost."""

    available: int
    needed: int
    block: int
    spread: int


def _blocks(facts: LogFacts) -> _Blocks | None:
    """The figures, where the log has them (TM_LOG_LEVEL=INFO) and they show a lack."""
    budget, slab = facts.first_event(CacheBudget), facts.first_event(Slab)
    if not (budget and slab):
        return None
    per_slab = slab.slab_size // slab.object_size
    available = budget.budget // slab.slab_size * per_slab
    warmups = [event.tokens for _, event in facts.every(WarmupLength)]
    block = facts.subject.options.get("cache_block_seq_len", _DEFAULT_BLOCK)
    assert isinstance(block, int)
    longest = facts.longest_warmup or max(warmups, default=0)
    needed = -(-longest // max(1, block))
    if needed <= available:
        return None
    return _Blocks(available=available, needed=needed, block=slab.object_size, spread=per_slab)


def _changes(facts: LogFacts, figures: _Blocks | None) -> tuple[str, ...]:
    """The smallest ratio that would start, where the log has the figures for it."""
    budget = facts.first_event(CacheBudget)
    rest = "lower --max-prefill-token-num, or free GPU memory"
    if figures is None or budget is None:
        return (f"raise --cache-max-entry-count, {rest}",)
    # Whole slabs, and one for the start of the region that is rarely aligned.
    slabs = -(-figures.needed // figures.spread) + 1
    ratio = -(-1000 * slabs * figures.spread * figures.block // budget.free)
    if ratio >= 1000:
        return (f"free GPU memory: no ratio of {format_bytes(budget.free)} would do; or {rest}",)
    return (f"raise --cache-max-entry-count to {ratio / 1000:.3f} at least, {rest}",)


def _silence(mark: LogEvent) -> RuleAnswer:
    return RuleAnswer(
        kind="start_hang",
        line=mark.line,
        possible=(
            "LMDeploy hangs there, silently: its cache is smaller than one warm-up request",
            "it was ended from outside, or the log was taken before the warm-up was over",
        ),
        evidence=(evidence(mark, "the last news: the cache was cut into blocks"),),
        changes=(
            "whether it still runs, with one core at full load: with TM_LOG_LEVEL=INFO a hang"
            " repeats `out of memory at 0/1`",
        ),
        planned=True,
    )
