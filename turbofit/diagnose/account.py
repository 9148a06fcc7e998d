"""What the account of a log's release says of a death: the phase by the bytes, and what would live.

turbofit knows what each byte of a GPU is for: of what a process held, the weights of a rank and its
contexts are taken off; what is left tells whether the cache existed. A cure is the log's own run
with one thing changed, which the same account lets live, the cheapest first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from msgspec.structs import replace

from turbofit.core.engine_end import End
from turbofit.core.messages import option_of
from turbofit.core.plan import Remedy
from turbofit.core.struct import Struct
from turbofit.core.units import GIB, format_bytes
from turbofit.core.version import REFERENCE
from turbofit.diagnose.case import with_used
from turbofit.memory.account import TEMPORARIES
from turbofit.memory.versions import release
from turbofit.observe.log_events import CacheBudget, KvBlocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.core.plan import GpuLedger, Plan
    from turbofit.diagnose.case import LogCase
    from turbofit.observe.death import Phase
    from turbofit.observe.log_events import TorchMemory

#: The part of what a process held below which figures agree.
_TENTH: Final = 10
#: The first release whose TurboMind runs the vision tower itself; before, torch runs it.
_NATIVE: Final = (0, 16)
#: Fewer bytes of other processes are the account's own doubt.
_OTHERS: Final = 2 * GIB
_WITH_RATIO: Final = ("cache", "warm-up", "vision", "text", "serving", "unknown")
_WITH_LIMIT: Final = ("vision", "serving", "unknown")
_MOST: Final = 3


class Cache(NamedTuple):
    """TurboMind's cache as a log has it: its bytes a card, what was free for it, its blocks."""

    size: int
    free: int
    lines: tuple[tuple[int, str], ...]
    blocks: str = ""


class Finding(Struct):
    """What the account says: a refused piece for `death`, sentences, and what is not known.

    ``others``: bytes of each card that somebody else held. ``short``: what the run lacked in all.
    ``weights``: those of a rank.
    """

    end: End | None = None
    why: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    others: int = 0
    short: int = 0
    weights: int = 0


def logged_cache(case: LogCase) -> Cache | None:
    budgets = case.facts.every(CacheBudget)
    if budgets:
        mark, budget = budgets[0]
        return Cache(budget.budget, budget.free, ((mark.line, mark.text),))
    fields = {event.field: (mark, event) for mark, event in reversed(case.facts.every(KvBlocks))}
    if not {"block_size", "max_block_count"} <= fields.keys():
        return None
    marks, (size, count) = zip(fields["block_size"], fields["max_block_count"], strict=True)
    if not size.value or not count.value or not 0 < case.ratio < 1:
        return None
    return Cache(
        size=size.value * count.value,
        free=round(size.value * count.value / case.ratio),
        lines=tuple((mark.line, mark.text) for mark in marks),
        blocks=f"{count.value} blocks of {format_bytes(size.value)}, ",
    )


def found(case: LogCase, phase: Phase, memory: TorchMemory | None, *, cached: bool) -> Finding:
    """What the account says of a lack of memory.

    Args:
        case: the log.
        phase: what its lines say of the phase.
        memory: torch's figures, if torch told of it.
        cached: whether a line before the death shows that the cache was made.
    """
    if not case.subject.of_lmdeploy or case.model is None:
        return Finding()
    forecast = case.forecast()
    if forecast is None:
        return Finding()
    place = memory.gpu if memory is not None and memory.gpu is not None else 0
    ledger = forecast.gpus[min(place, len(forecast.gpus) - 1)]
    cache, finding = logged_cache(case), Finding()
    if cache is not None:
        finding = _of_cache(case, cache, ledger)
    elif memory is not None and memory.process is not None and memory.allocated is not None:
        finding = _of_torch(case, phase, memory, ledger, cached=cached)
    elif phase == "unknown":
        finding = _of_load(ledger)
    weights = ledger.bytes_in("weights") - ledger.bytes_of(TEMPORARIES)
    finding = replace(finding, weights=weights if cache is not None else 0)
    if finding.others:
        return finding
    if cache is not None:
        sized = case.forecast(free_at_cache=cache.free)
        forecast = forecast if sized is None else sized
    if case.version is None:
        finding = replace(finding, unknown=(*finding.unknown, f"assumed LMDeploy {REFERENCE}"))
    named = finding.end.phase if finding.end else phase
    short = max(
        (gpu.load_peak if named == "weights" else gpu.peak) - gpu.usable for gpu in forecast.gpus
    )
    if short > 0 and (cache is not None or named == "weights"):
        finding = replace(
            finding, short=short, why=(*finding.why, f"by the account: {_says(forecast)}")
        )
    elif short <= 0 and (cache is not None or named == "weights"):
        said = (
            "what took the rest: by the account these settings leave room on such cards (other"
            " programs, other settings, another LMDeploy)"
        )
        finding = replace(finding, unknown=(*finding.unknown, said))
    return finding


def _says(plan: Plan) -> str:
    return plan.verdict.partition(": ")[2] or plan.verdict


def _of_cache(case: LogCase, cache: Cache, ledger: GpuLedger) -> Finding:
    """What a line about the cache tells: its share, what stayed, and whether others held memory."""
    weights = ledger.bytes_in("weights") - ledger.bytes_of(TEMPORARIES)
    rest = ledger.usable - cache.free - weights
    given = "cache_max_entry_count" in case.subject.options or not cache.blocks
    ratio = f"ratio {case.ratio if cache.blocks else cache.size / cache.free:.3g}"
    ratio += "" if given else ", if nobody set another"
    why = [
        f"the cache took {cache.blocks}{format_bytes(cache.size)} of {format_bytes(cache.free)} that"
        f" were free ({ratio}): {format_bytes(cache.free - cache.size)} stayed for buffers, the"
        " warm-up and every request, images included"
    ]
    # A newer engine's rest includes memory of loading.
    others = rest if cache.blocks and rest > _OTHERS else 0
    if others:
        why.append(
            f"the cards were not empty: only {format_bytes(cache.free)} were free when the cache was"
            f" sized, though the weights of a rank take {format_bytes(weights)} at tp {case.tp}:"
            f" about {format_bytes(others)} were held by somebody else, or by other copies of this"
            " engine"
        )
    return Finding(why=tuple(why), others=others)


def _of_torch(
    case: LogCase, phase: Phase, memory: TorchMemory, ledger: GpuLedger, *, cached: bool
) -> Finding:
    """What is left of the process's bytes beyond weights and contexts, and so the phase."""
    held, torch = memory.process or 0, (memory.allocated or 0) + (memory.cached or 0)
    turbomind, tower = case.engine.name == "turbomind", ledger.bytes_of("weights.vision_tower")
    weights = ledger.bytes_in("weights") - ledger.bytes_of(TEMPORARIES)
    context = ledger.bytes_in("context")
    region = sum(term.bytes for term in ledger.ledger if term.phase == "cache")
    torch_tower = turbomind and release(case.engine.version) < _NATIVE
    if turbomind:
        base = context + weights - (tower if torch_tower else 0)
        rest = held - torch - base
    else:
        base, rest = weights, (memory.allocated or 0) - weights
    others = sum(size for _, size in memory.others)
    doubt = held // _TENTH
    if (memory.total and held + (memory.free or 0) + others > memory.total + doubt) or (
        rest < -doubt and cached
    ):
        parts = f"{format_bytes(weights)} of weights and {format_bytes(context)} of CUDA's context"
        return Finding(
            unknown=(
                "the phase: the figures contradict each other (this process held"
                f" {format_bytes(held)}, and {case.model.name if case.model else ''} at tp {case.tp}"
                f" takes {parts} on a rank alone): other settings or another model ran",
            )
        )
    of_torch = f", torch {format_bytes(torch)}" if turbomind else ""
    said = (
        f"of {format_bytes(held)} that this process held, the weights of a rank are"
        f" {format_bytes(weights)} and CUDA's context about {format_bytes(context)}{of_torch}"
    )
    if rest > doubt:
        said += (
            f": about {format_bytes(rest)} of it were the KV cache with its buffers (the ratio"
            f" {case.ratio:g} gives {format_bytes(region)} by the account), so it died after the"
            " cache was made"
        )
        named = "vision" if torch_tower else "after"
        unknown = () if torch_tower or (case.model and not case.model.vision) else (
            "whether an image or a long prompt asked for it: the traceback before the error tells",
        )  # fmt: skip
        named = "text" if case.model and not case.model.vision else named
    else:
        whole = "the weights were not yet whole" if rest < -doubt else "nothing is left for a cache"
        named = "weights"
        if not turbomind and (memory.requested or 0) > region // 2 > 0:
            named, whole = "cache", "it asked for the cache itself"
        said, unknown = f"{said}: {whole}", ()
    end = End(phase=named) if phase == "unknown" else None
    return Finding(end=end, why=(said,), unknown=unknown)


def _of_load(ledger: GpuLedger) -> Finding:
    """Whether loading needs more than the card has; without figures nothing else tells the phase."""
    peak, usable = format_bytes(ledger.load_peak), format_bytes(ledger.usable)
    if ledger.load_peak > ledger.usable:
        why = f"loading needs {peak} of a card that has {usable}, by the account of this release"
        return Finding(end=End(phase="weights"), why=(why,))
    return Finding(
        unknown=(
            f"the phase: loading needs {peak} of {usable} by the account, so an empty card had its"
            " weights; TM_LOG_LEVEL=INFO prints the cache's size before what comes after it",
        )
    )


class Cure(NamedTuple):
    """A change with which the log's run would have lived, and the run then."""

    change: str
    plan: Plan

    @property
    def remedy(self) -> Remedy:
        tokens = f"lives, with {self.plan.kv.tokens:,} KV tokens"
        return Remedy(change=self.change, effect=tokens)


def cures(case: LogCase, phase: Phase, finding: Finding, others: int) -> Iterator[Cure]:
    """Yields changes that the release's account lets live, the cheapest first, three at most."""
    machine, cache = case.machine, logged_cache(case)
    if machine is None or case.model is None or not case.subject.of_lmdeploy:
        return
    kept: dict[str, Any] = {"on": with_used(machine, others) if others else machine}
    sized = {"free_at_cache": cache.free} if cache and not finding.others else {}
    tried = [*_ratios(case, phase, kept | sized), *_limits(case, phase, kept | sized)]
    tried += list(_degrees(case, kept)) if len(tried) < _MOST else []
    yield from tried[:_MOST]


def _lives(case: LogCase, change: str, **changed: Any) -> Iterator[Cure]:
    plan = case.forecast(**changed)
    if plan is not None and plan.fits:
        yield Cure(change, plan)


def _ratios(case: LogCase, phase: Phase, kept: dict[str, Any]) -> Iterator[Cure]:
    """The largest lower ratio that lives, in hundredths; the less, the more room."""
    lives, dies, best = 0, round(case.ratio * 100), None
    while phase in _WITH_RATIO and case.ratio < 1 and dies - lives > 1:
        tried = (lives + dies) // 2
        option = f"--cache-max-entry-count {tried / 100:g}"
        cure = next(_lives(case, option, **kept, cache_max_entry_count=tried / 100), None)
        lives, dies, best = (tried, dies, cure) if cure else (lives, tried, best)
        if best is None and dies <= 1:
            return
    if best is not None:
        yield best


def _limits(case: LogCase, phase: Phase, kept: dict[str, Any]) -> Iterator[Cure]:
    """The largest common image limit below the checkpoint's own that lives."""
    rule = case.model.image_rule if case.model else None
    if rule is None or phase not in _WITH_LIMIT or not rule.varies_by_limit:
        return
    for limit in (n for n in rule.common_limits if n < rule.checkpoint_limit):
        change = f"{option_of(rule.limit_name)} {limit} for every image"
        if cure := next(_lives(case, change, **kept, **{rule.limit_name: limit}), None):
            yield cure
            return


def _degrees(case: LogCase, kept: dict[str, Any]) -> Iterator[Cure]:
    """The smallest larger degree that lives on the log's cards."""
    cards = len(case.machine.gpus) if case.machine else 1
    for tp in (n for n in (2, 4, 8) if case.tp < n <= cards):
        if cure := next(_lives(case, f"--tp {tp}", **kept, tp=tp), None):
            yield cure
            return


def smaller(case: LogCase) -> tuple[Remedy, ...]:
    """A remedy that names the model's published 4-bit variant; empty if there is none."""
    from turbofit.model.presets import four_bit_variant

    variant = four_bit_variant(case.model) if case.model else None
    if variant is None or case.model is None:
        return ()
    saved = format_bytes(case.model.weight_bytes - variant.weight_bytes)
    change = f"{variant.hub_id or variant.name} instead"
    return (Remedy(change=change, effect=f"{saved} less of weights, which the cache gets"),)
