"""LMDeploy 0.2 to 0.14: BlockManager lines, `CUDA runtime error`, the torch vision tower."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.plan import Settings
from turbofit.core.struct import Struct
from turbofit.core.units import GIB, format_bytes
from turbofit.diagnose.answer import Evidence, Holding, Missing
from turbofit.diagnose.case import LogCase, usable
from turbofit.diagnose.rules.draft import RuleAnswer, evidence
from turbofit.observe.log_events import KvBlocks, LegacyCuda
from turbofit.observe.stages import out_of_memory, when

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.diagnose.event import LogEvent
    from turbofit.diagnose.facts import LogFacts
    from turbofit.observe.stages import Phase

START_ONCE: Final = (
    "start the engine once (plain python, or --nproc_per_node=1), not under torchrun"
)
#: Cache ratios to try, one after the other.
_RATIOS: Final = (0.5, 0.4, 0.3, 0.2)
#: LMDeploy's own default since 0.2.2.
_DEFAULT_RATIO: Final = 0.8
#: More than contexts and communicators of one engine take on a card.
_ENGINE_OVERHEAD: Final = 2 * GIB
_VISION_WORDS: Final = ("vl/engine", "vl/model", "vision", "intern_vit", "visual")
_LOAD_WORDS: Final = ("process_weight", "load_weight", "create_shared_weights", "export", "load")


class LegacyBlocks(Struct):
    """The cache of an older engine, from its BlockManager: bytes a card, and how free follows.

    ``ratio`` is the log's, or the default where it is ``assumed``. ``weights`` are the account's
    of one rank, ``total`` is what CUDA can hand out; None where model or card is not known.
    """

    block: int
    count: int
    ratio: float
    assumed: bool
    weights: int | None
    total: int | None
    lines: tuple[Evidence, ...]

    @property
    def cache(self) -> int:
        return self.block * self.count

    @property
    def free(self) -> int:
        """Bytes that were free when the cache was sized."""
        return round(self.cache / self.ratio)

    @property
    def rest(self) -> int:
        """Bytes of the card that neither weights nor what was free explains."""
        if self.weights is None or self.total is None:
            return 0
        return self.total - self.free - self.weights

    @property
    def others(self) -> int:
        """Bytes that this engine does not explain."""
        return self.rest if self.rest > _ENGINE_OVERHEAD else 0


def blocks(case: LogCase) -> LegacyBlocks | None:
    defaults = case.turbomind.defaults("")
    size = count = None
    lines = []
    for mark, event in case.facts.every(KvBlocks):
        if event.field == "block_size" and size is None:
            size = event.value
            tokens = defaults.get("cache_block_seq_len", Settings().cache_block_seq_len)
            lines.append(evidence(mark, f"bytes of one KV block ({tokens} tokens, all layers)"))
        elif event.field == "max_block_count" and count is None:
            count = event.value
            lines.append(evidence(mark, "how many blocks the cache has"))
    if not size or not count:
        return None
    fits = case.ratio is not None and 0 < case.ratio < 1
    # LMDeploy's own ratio; what it was of before 0.2.2 has no meaning for free memory.
    default = _DEFAULT_RATIO
    if case.turbomind.ratio_of_free:
        default = float(str(defaults["cache_max_entry_count"]))
    return LegacyBlocks(
        block=size,
        count=count,
        ratio=case.ratio if case.ratio and fits else default,
        assumed=not fits,
        weights=_language_weights(case),
        total=usable(case.gpu) if case.gpu else None,
        lines=tuple(lines),
    )


def legacy_rules(case: LogCase) -> Iterator[RuleAnswer]:
    for mark, event in case.facts.every(LegacyCuda):
        if event.out_of_memory:
            yield _out_of_memory(case, mark, event)
            return


def _out_of_memory(case: LogCase, mark: LogEvent, event: LegacyCuda) -> RuleAnswer:
    facts, kv_blocks = case.facts, blocks(case)
    phase = _phase(facts, mark)
    why: list[str] = []
    holdings: list[Holding] = []
    lines = [evidence(mark, "TurboMind's own out-of-memory error")]
    unknown = ["how much the failing allocation asked for: this LMDeploy does not print it"]
    if kv_blocks is not None:
        lines[:0] = kv_blocks.lines
        why += cache_story(case, kv_blocks)
        if kv_blocks.assumed:
            unknown.append(f"the cache ratio: {kv_blocks.ratio:g} is LMDeploy's default")
        holdings += cache_holders(kv_blocks)
    twice = double_start(case)
    if twice:
        why.append(twice[0])
        lines.append(twice[1])
    said = out_of_memory("TurboMind", phase, event.where)
    return RuleAnswer(
        kind="out_of_memory",
        phase=phase,
        what=said.replace(when("serving"), "after its cache was made"),
        line=mark.line,
        why=tuple(why),
        held=tuple(holdings),
        missing=Missing(bytes=None, basis="unknown", note="this LMDeploy prints no sizes"),
        unknown=tuple(unknown),
        evidence=tuple(sorted(lines, key=lambda row: row.line)),
        changes=_changes(phase, case),
        planned=True,
        others=kv_blocks.others if kv_blocks and not twice else 0,
    )


def cache_story(case: LogCase, kv_blocks: LegacyBlocks) -> Iterator[str]:
    """The cache in numbers, and whether the cards were empty before this engine came."""
    # All figures but the cache's own rest on the ratio.
    ratio = f"ratio {kv_blocks.ratio:g}" + (", if nobody set another" if kv_blocks.assumed else "")
    free = format_bytes(kv_blocks.free)
    yield (
        f"the cache took {kv_blocks.count} blocks of {format_bytes(kv_blocks.block)},"
        f" {format_bytes(kv_blocks.cache)} of the {free} that were free ({ratio}):"
        f" {format_bytes(kv_blocks.free - kv_blocks.cache)} stayed for everything after it, images"
        " included"
    )
    if kv_blocks.others:
        yield (
            f"the cards were not empty ({ratio}): only {free} were free when the cache was sized,"
            f" though the weights take {format_bytes(kv_blocks.weights or 0)} a card at tp"
            f" {case.tp or 1}: about {format_bytes(kv_blocks.others)} were held by somebody else"
            " (or by other copies of this engine)"
        )


def cache_holders(kv_blocks: LegacyBlocks) -> Iterator[Holding]:
    """Who held a card when the cache was sized, as far as model and card are known."""
    lines = tuple(row.line for row in kv_blocks.lines)
    yield Holding(who="the KV cache", bytes=kv_blocks.cache, lines=lines)
    if kv_blocks.weights is not None and kv_blocks.total is not None:
        yield Holding(who="this model's weights, on each card", bytes=kv_blocks.weights)
    if kv_blocks.rest > 0:
        yield Holding(who="CUDA contexts and everybody else, together", bytes=kv_blocks.rest)


def _language_weights(case: LogCase) -> int | None:
    """Bytes of the language model's weights on one rank, by the account (the tower apart)."""
    if case.model is None:
        return None
    weights = case.turbomind.weights(case.model, case.tp or 1)
    return weights.total - weights.vision


def double_start(case: LogCase) -> tuple[str, Evidence] | None:
    """A rank launcher around an engine that drives all its GPUs itself."""
    ranks = case.facts.subject.ranks
    if ranks is None or (case.tp or 1) < 2:
        return None
    count, (line, text) = ranks
    return (
        f"a rank launcher started the program {count} times, and each start builds a whole engine"
        f" with tp {case.tp} on the same cards: {count} models in the place of one; start it once,"
        " without torchrun",
        Evidence(line=line, text=text.strip()[:240], tells=f"{count} processes of one program"),
    )


def _changes(phase: Phase, case: LogCase) -> tuple[str, ...]:
    """What to change, surest first."""
    changes = []
    if double_start(case):
        changes.append(START_ONCE)
    if phase in ("weights", "unknown"):
        changes.append("more GPUs (--tp), a quantised variant, or freer cards")
    return tuple(changes) if phase == "weights" else (*changes, *lower_ratio(case))


def lower_ratio(case: LogCase) -> tuple[str, ...]:
    """What leaves more of a card for what comes after the cache."""
    lower = [f"{ratio:g}" for ratio in _RATIOS if case.ratio is None or ratio < case.ratio][:2]
    if not lower:
        return (
            f"not the cache: it had only {case.ratio:g} of what was free. More GPUs (--tp), a"
            " quantised variant, freer cards, a smaller --session-len and --max-batch-size",
        )
    return (
        f"a lower cache_max_entry_count: {', then '.join(lower)}",
        "fewer image tiles (max_dynamic_patch) or smaller images",
    )


def _phase(facts: LogFacts, mark: LogEvent) -> Phase:
    """By the Python stack, else by the file that allocates and the cache that was printed."""
    for frame in reversed(mark.stack):
        name = f"{frame.path} {frame.function}"
        if any(word in name for word in _VISION_WORDS):
            return "vision"
        if any(word in frame.function for word in _LOAD_WORDS):
            return "weights"
    if not facts.before(mark, KvBlocks):
        # Weights are allocated in memory_utils.cu, all else through the allocator.
        return "weights" if "memory_utils" in mark.text else "unknown"
    return "serving"
