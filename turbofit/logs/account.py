"""Finds by an engine's account in which phase a logged run ran out of memory.

The account names each byte of a GPU. A process held the weights of its rank, CUDA contexts and a
rest: the size of this rest shows whether the cache existed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec.structs import replace

from turbofit.core.engine_end import AnyEnd
from turbofit.core.struct import Struct
from turbofit.core.units import GIB, format_bytes
from turbofit.logs.answer import Missing
from turbofit.logs.causes import text_of
from turbofit.logs.log_events import CacheBudget, KvBlocks
from turbofit.machine.torch_memory import TorchMemory
from turbofit.memory.account import TEMPORARIES
from turbofit.memory.versions import release

if TYPE_CHECKING:
    from turbofit.core.engine_end import Phase
    from turbofit.core.plan import GpuLedger, Plan
    from turbofit.logs.case import LogCase


#: Figures agree if they differ by at most this part of the bytes that the process held: a tenth.
_TENTH: Final = 10
#: The first release in which TurboMind runs the vision tower; in older releases torch does.
_NATIVE: Final = (0, 16)
#: The log contradicts the account if the bytes that were free for the cache differ from the
#: forecast by more than this part of it: a quarter.
_QUARTER: Final = 4
#: The account may be wrong by this many bytes, so fewer bytes prove no other process.
_OTHERS: Final = 2 * GIB


class Cache(NamedTuple):
    """TurboMind's KV cache, as a log reports it.

    ``size``: the cache's bytes on each card. ``free``: bytes of a card that were free just before
    the cache was made. ``lines``: the lines that report the cache, each with its number.
    ``blocks``: the number and size of the cache's blocks in words, if the log has them.
    """

    size: int
    free: int
    lines: tuple[tuple[int, str], ...]
    blocks: str = ""


class Finding(Struct):
    """What the account says of a lack of memory.

    ``end``: the phase, for `death`; None if the account does not show the phase. ``why``: sentences
    on what the account shows; ``unknown``: sentences on what it leaves open. ``others``: bytes of
    each card that belonged to other programs, or to further copies of the engine. ``short``: the
    bytes that the run lacked in all. ``weights``: bytes of a rank's weights; 0 if the log does not
    report the cache's size. ``contradiction``: how the log contradicts the account, in words; empty
    if it does not.
    """

    end: AnyEnd | None = None
    why: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    others: int = 0
    short: Missing | None = None
    weights: int = 0
    contradiction: str = ""


def logged_cache(case: LogCase) -> Cache | None:
    """Return the KV cache that a log reports, or None.

    The bytes are from the line of the cache's budget; without this line, they are the product of
    the size and the number of blocks.
    """
    for mark, budget in case.facts.every(CacheBudget):
        return Cache(budget.budget, budget.free, ((mark.line, mark.text),))
    fields = {event.field: (mark, event) for mark, event in reversed(case.facts.every(KvBlocks))}
    sized, counted = fields.get("block_size"), fields.get("max_block_count")
    if sized is None or counted is None or not 0 < case.ratio < 1:
        return None
    size, count = sized[1].value, counted[1].value
    lines = tuple((mark.line, mark.text) for mark, _ in (sized, counted))
    blocks = f"{count} blocks of {format_bytes(size)}, "
    total = size * count
    return Cache(total, round(total / case.ratio), lines, blocks) if total else None


def found(case: LogCase, phase: Phase, memory: TorchMemory | None, *, cached: bool) -> Finding:
    """Return what the account says of a lack of memory; an empty finding without an account.

    Args:
        case: the log.
        phase: the phase that the lines of the log show.
        memory: torch's figures, if torch reported the lack.
        cached: whether a line before the death shows that the cache was made.
    """
    forecast = case.forecast() if case.has_account else None
    if forecast is None:
        return Finding()
    place = memory.gpu if memory and memory.gpu else 0
    ledger = forecast.ledgers[min(place, len(forecast.ledgers) - 1)]
    finding = Finding()
    if (cache := logged_cache(case)) is not None:
        finding = _of_cache(case, cache, ledger)
        if not finding.others and (against := _contradiction(case, cache, forecast)):
            return replace(finding, contradiction=against)
        forecast = case.forecast(free_at_cache=cache.free) or forecast
    elif memory and memory.process is not None and memory.allocated is not None:
        finding = _of_torch(
            case, phase, memory, ledger, cached=cached, turbomind=not forecast.backend.is_pytorch
        )
    elif phase == "unknown":
        finding = _of_load(ledger)
    if case.assumption:
        release_words = f"the release of LMDeploy: {forecast.backend.version} is {case.assumption}"
        finding = replace(finding, unknown=(*finding.unknown, release_words))
    return (
        finding if finding.others else _with_shortage(finding, forecast, phase, memory, bool(cache))
    )


def _with_shortage(
    finding: Finding, forecast: Plan, phase: Phase, memory: TorchMemory | None, cached: bool
) -> Finding:
    """Add to a finding the bytes that, by the account, the run lacked.

    If these bytes do not explain the death, add a note that something unknown took memory.
    """
    died_in = finding.end.phase if finding.end else phase
    short = most(forecast, died_in) - min(gpu.usable for gpu in forecast.ledgers)
    lacked = memory.missing if memory else None
    # By the account the run must have lacked bytes; at least as many as torch says, if torch does.
    explained = short > 0 if lacked is None else lacked <= max(short, 0)
    if not explained:
        leave = f"lack at most {format_bytes(short)}" if short > 0 else "leave room"
        rest = (
            f"what took the rest: by the account these settings {leave} on such cards (other"
            " programs, other settings, another LMDeploy)"
        )
        return replace(finding, unknown=(*finding.unknown, rest))
    if short <= 0 or not (cached or died_in == "weights"):
        return finding
    verdict = forecast.verdict.partition(": ")[2] or forecast.verdict
    note = "for all that these settings let in, by the account"
    in_all = Missing(bytes=short, basis="formula", note=note)
    return replace(finding, short=in_all, why=(*finding.why, f"by the account: {verdict}"))


def most(plan: Plan, phase: str) -> int:
    """Return the most bytes that a plan takes on any GPU.

    If ``phase`` is ``weights``, only the time of loading counts.
    """
    return max(gpu.load_peak if phase == "weights" else gpu.peak for gpu in plan.ledgers)


def _weights(ledger: GpuLedger) -> int:
    return ledger.bytes_in("weights") - ledger.bytes_of(TEMPORARIES)


def _of_cache(case: LogCase, cache: Cache, ledger: GpuLedger) -> Finding:
    """Return what the logged size of the cache shows about a lack of memory.

    The finding has the cache's share of the free memory, the bytes that the cache left, and the
    bytes that other programs held.
    """
    weights = _weights(ledger)
    others = ledger.usable - cache.free - weights
    given = "cache_max_entry_count" in case.subject.options or not cache.blocks
    ratio = case.ratio if cache.blocks else cache.size / cache.free
    why = (
        f"the cache took {cache.blocks}{format_bytes(cache.size)} of {format_bytes(cache.free)}"
        f" that were free (ratio {ratio:.3g}{'' if given else ', if nobody set another'}):"
        f" {format_bytes(cache.free - cache.size)} stayed for buffers,"
        " the warm-up and every request, images included"
    )
    # A newer engine logs no blocks: its ``others`` may be memory of the load, and prove nothing.
    if not cache.blocks or others <= _OTHERS:
        return Finding(why=(why,), weights=weights)
    held = (
        f"the cards were not empty: only {format_bytes(cache.free)} were free when the cache was"
        f" sized, though the weights of a rank take {format_bytes(weights)} at tp {case.tp}: about"
        f" {format_bytes(others)} were held by somebody else, or by other copies of this engine"
    )
    return Finding(why=(why, held), others=others, weights=weights)


def _contradiction(case: LogCase, cache: Cache, forecast: Plan) -> str:
    """Return how the bytes that were free for the cache contradict the account, in words, or "".

    They contradict it if the account leaves nothing there, or if they differ by more than a
    quarter. Others on the cards, another model or other cards than the log names explain it.
    """
    free = min(ledger.free_for_cache for ledger in forecast.ledgers)
    if free > 0 and abs(cache.free - free) <= free // _QUARTER:
        return ""
    left = f"{format_bytes(free)} free" if free > 0 else f"none: {format_bytes(-free)} are short"
    return (
        f"the log contradicts turbofit's account: {format_bytes(cache.free)} were free when the"
        f" cache was sized, and {forecast.model.name} at tp {case.tp} leaves {left} on such cards"
    )


def _of_torch(
    case: LogCase,
    phase: Phase,
    memory: TorchMemory,
    ledger: GpuLedger,
    *,
    cached: bool,
    turbomind: bool,
) -> Finding:
    """Find the phase by the bytes that the process held beyond its weights and contexts.

    If this rest is more than a tenth of what the process held, the cache existed; else the run was
    loading. Figures that contradict each other show no phase.
    """
    held, allocated = memory.process or 0, memory.allocated or 0
    torch = allocated + (memory.cached or 0)
    weights, context = _weights(ledger), ledger.bytes_in("context")
    rest = allocated - weights
    torch_tower = turbomind and release(case.engine.version) < _NATIVE
    if turbomind:
        tower = ledger.bytes_of("weights.vision_tower") if torch_tower else 0
        # Torch's bytes already include a tower that torch runs.
        rest = held - torch - context - (weights - tower)
    doubt, past = held // _TENTH, cached or phase not in ("weights", "unknown")
    of_weights = f"{format_bytes(weights)} and CUDA's context about {format_bytes(context)}"
    if memory.beyond > doubt or (rest < -doubt and past):
        contradiction = (
            f"the phase: the figures contradict each other (this process held {format_bytes(held)},"
            f" and the weights of a rank at tp {case.tp} alone are {of_weights}): other settings or"
            " another model ran"
        )
        return Finding(unknown=(contradiction,))
    parts = (
        f"of {format_bytes(held)} that this process held, the weights of a rank are {of_weights}"
        f"{f', torch {format_bytes(torch)}' if turbomind else ''}: "
    )
    region = ledger.bytes_in("cache")
    if rest > doubt:
        named = "vision" if torch_tower else "after"
        if case.reads_text_alone:
            named = "text"
        what = (
            f"about {format_bytes(rest)} of it were the KV cache with its buffers (the ratio"
            f" {case.ratio:g} gives {format_bytes(region)} by the account), so it died after the"
            " cache was made"
        )
    else:
        named = "weights"
        what = "the weights were not yet whole" if rest < -doubt else "nothing is left for a cache"
    end = AnyEnd(phase=named) if phase == "unknown" else None
    unknown = (text_of("image or text"),) if named == "after" else ()
    return Finding(end=end, why=(parts + what,), unknown=unknown)


def _of_load(ledger: GpuLedger) -> Finding:
    """Return a finding with the phase ``weights`` if loading needs more bytes than the card has.

    Otherwise the finding says that the phase is unknown.
    """
    peak, usable = format_bytes(ledger.load_peak), format_bytes(ledger.usable)
    if ledger.load_peak > ledger.usable:
        why = f"loading needs {peak} of a card that has {usable}, by the account of this release"
        return Finding(end=AnyEnd(phase="weights"), why=(why,))
    fits = (
        f"the phase: loading needs {peak} of {usable} by the account, so the weights fit an empty"
        " card; with TM_LOG_LEVEL=INFO the log has the cache's size, if the cache was made"
    )
    return Finding(unknown=(fits,))
