"""Rules for hangs: a cache smaller than its warm-up request, a server that makes no token."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, Final

from msgspec import convert

from turbofit.core.messages import plural
from turbofit.core.plan import Settings
from turbofit.core.struct import Struct
from turbofit.core.units import format_bytes
from turbofit.diagnose.answer import Missing
from turbofit.diagnose.rules.draft import RuleAnswer, evidence
from turbofit.memory.kv_cache import LoggedSlab
from turbofit.observe.engine_end import diagnosed
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

#: Settings that size the cache.
_SIZING: Final = ("cache_block_seq_len", "max_batch_size", "session_len")
_WAITS: Final = (
    "the warm-up sends one request as long as a forward; while the cache has fewer blocks than it"
    " needs, the scheduler tries again for ever, without an error"
)
_RATIO: Final = "raise --cache-max-entry-count, "
_HANGS: Final = "LMDeploy hangs in its warm-up for ever: its cache cannot hold one warm-up request"
_READ: Final[dict[type[Struct], str]] = {
    CacheBudget: "the cache's size", Slab: "the size of a block",
    WarmupLengths: "the lengths of the warm-up",
}  # fmt: skip


def hang_rules(case: LogCase) -> Iterator[RuleAnswer]:
    """Yields hangs: a warm-up that waits, with or without lines about it, and a halted server."""
    facts = case.facts
    yield from _stands_still(case)
    over = (WarmupFinished, ServerUp, CudaError, CheckFailed)
    if any(isinstance(mark.event, over) for mark in facts.marks):
        return
    slab = facts.first(Slab)
    if facts.waiting:
        yield _hang(case, facts.waiting)
    elif slab and isinstance(facts.marks[-1].event, Slab | CacheBudget):
        yield _silence(slab)


def _stands_still(case: LogCase) -> Iterator[RuleAnswer]:
    """Yields a halted server: by LMDeploy's last count, requests run but made no token in 10 s."""
    counted = case.facts.every(ServerFigures)
    if not counted or case.event.outcome == "fatal":
        return
    counts = (figures for _, figures in reversed(counted))
    still = sum(1 for _ in takewhile(lambda one: one.running and one.made == 0.0, counts))
    mark, last = counted[-1]
    if still:
        yield RuleAnswer(
            kind=diagnosed("stalled"),
            line=mark.line,
            rank="consequence",
            what=f"no line of this log tells of an error, and where it ends {last.running}"
            f" {plural(last.running or 0, 'request')} run and no token came for {10 * still}"
            " seconds: the engine stands still, or reads a long prompt",
            evidence=(evidence(mark, "LMDeploy's own count, which it prints every ten seconds"),),
        )


def _hang(case: LogCase, waiting: LogEvent) -> RuleAnswer:
    facts, (missing, ratio) = case.facts, _lack(case)
    waits = f"nothing can be admitted; {facts.waits:,} such lines to the log's end"
    sizes = [evidence(mark, _READ[kind]) for kind in _READ if (mark := facts.first(kind))]
    return RuleAnswer(
        kind=diagnosed("hang"),
        phase="start-up hang",
        what=_HANGS if missing else "",
        line=waiting.line,
        possible=(_WAITS,),
        why=(_WAITS,) if missing else (),
        missing=missing,
        evidence=(evidence(waiting, waits), *sizes),
        changes=(f"{ratio}lower --max-prefill-token-num, or free GPU memory",),
        planned=True,
    )


def _lack(case: LogCase) -> tuple[Missing | None, str]:
    """What the cache lacks, and the smallest ratio that would do, as the beginning of an advice.

    None if the cache lacks nothing, or if the log has no figures of it (needs TM_LOG_LEVEL=INFO).
    """
    facts = case.facts
    budget, slab = facts.first_event(CacheBudget), facts.first_event(Slab)
    if not (budget and slab):
        return None, _RATIO
    options = case.turbomind.defaults("") | facts.subject.options
    told = {name: options[name] for name in _SIZING if name in options}
    logged = LoggedSlab(slab.slab_size, slab.object_size)
    shape = case.turbomind.logged_cache([logged], convert(told, Settings))
    if shape is None or not shape.block_tokens:
        return None, _RATIO
    warmups = [event.tokens for _, event in facts.every(WarmupLength)]
    longest = facts.longest_warmup or max(warmups, default=0)
    needed = -(-longest // shape.block_tokens)
    holds = shape.tokens(budget.budget) // shape.block_tokens
    if needed <= holds:
        return None, _RATIO
    enough = needed * shape.block_tokens
    ratios = (n / 1000 for n in range(1, 1000) if shape.tokens(budget.free * n // 1000) >= enough)
    ratio = next(ratios, None)
    missing = Missing(
        bytes=(needed - holds) * slab.object_size,
        basis="formula",
        note=f"of cache: it holds {holds} blocks of {format_bytes(slab.object_size)} at least, one"
        f" warm-up request needs {needed}",
        doubt=slab.slab_size,
    )
    return missing, f"raise --cache-max-entry-count to {ratio:.3f} at least, " if ratio else ""


def _silence(mark: LogEvent) -> RuleAnswer:
    return RuleAnswer(
        kind=diagnosed("hang"),
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
