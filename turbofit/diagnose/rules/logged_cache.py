"""TurboMind's cache as a log describes it: its size, the free memory, and the card's holders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.plan import Settings
from turbofit.core.struct import Struct
from turbofit.core.units import GIB, format_bytes
from turbofit.diagnose.answer import Evidence, Holding
from turbofit.diagnose.case import LogCase
from turbofit.diagnose.rules.draft import RuleAnswer, evidence, evidence_at
from turbofit.observe.log_events import CacheBudget, KvBlocks

if TYPE_CHECKING:
    from collections.abc import Iterator

_START_ONCE: Final = (
    "start the engine once (plain python, or --nproc_per_node=1), not under torchrun"
)
#: Cache ratios to try, in this order.
_RATIOS: Final = (0.5, 0.4, 0.3, 0.2)
#: Bytes on a card that exceed the contexts and communicators of one engine.
_ENGINE_OVERHEAD: Final = 2 * GIB


class LoggedCache(Struct):
    """A cache in bytes per card, the memory that was free for it, and the weights before it.

    ``ratio`` is the log's; if ``assumed``, it is the default. ``weights`` are one rank's by the
    account, ``total`` is the memory that CUDA can allocate; each is 0 without model or card.
    ``blocks`` describes the blocks of an engine of 0.2 to 0.14; it is empty for a newer engine.
    """

    size: int
    free: int
    ratio: float
    weights: int
    total: int
    lines: tuple[Evidence, ...]
    assumed: bool = False
    blocks: str = ""

    @property
    def rest(self) -> int:
        """Bytes of the card that are neither weights nor free; 0 if they cannot be computed."""
        known = self.weights and self.total
        return self.total - self.free - self.weights if known else 0

    @property
    def others(self) -> int:
        """Bytes of other processes; 0 for a newer engine: its rest includes memory of loading."""
        return self.rest if self.blocks and self.rest > _ENGINE_OVERHEAD else 0

    def story(self, tp: int) -> Iterator[str]:
        """Yields the cache's figures, and whether the cards were empty before this engine."""
        # Of an older engine's figures only the cache size does not depend on the ratio.
        ratio = f"ratio {self.ratio:g}" + (", if nobody set another" if self.assumed else "")
        yield (
            f"the cache took {self.blocks}{format_bytes(self.size)} of {format_bytes(self.free)}"
            f" that were free ({ratio}): {format_bytes(self.free - self.size)} stayed for buffers,"
            " the warm-up and every request, images included"
        )
        if self.others:
            yield (
                f"the cards were not empty ({ratio}): only {format_bytes(self.free)} were free when"
                f" the cache was sized, though the weights take {format_bytes(self.weights)} a"
                f" card at tp {tp}: about {format_bytes(self.others)} were held by somebody else"
                " (or by other copies of this engine)"
            )

    def holders(self) -> Iterator[Holding]:
        """Yields the known holders of a card's memory at the time when the cache was sized."""
        lines = tuple(row.line for row in self.lines)
        yield Holding(who="the KV cache", bytes=self.size, lines=lines)
        if self.weights and self.total:
            yield Holding(who="this model's weights, on each card", bytes=self.weights)
        if self.rest > 0:
            who = "CUDA contexts and everybody else, together"
            yield Holding(who=who, bytes=self.rest, lines=lines)


def logged_cache(case: LogCase) -> LoggedCache | None:
    budgets = case.facts.every(CacheBudget)
    if not budgets:
        return _of_blocks(case)
    mark, budget = budgets[0]
    tp = case.tp or len(budgets)
    return LoggedCache(
        size=budget.budget,
        free=budget.free,
        ratio=budget.ratio,
        weights=case.turbomind.weights(case.model, tp).total if case.model else 0,
        total=case.gpu.usable if case.gpu else 0,
        lines=(evidence(mark, "free memory, and what the cache took of it"),),
    )


def _of_blocks(case: LogCase) -> LoggedCache | None:
    """The cache of LMDeploy 0.2 to 0.14, from the lines of its BlockManager."""
    fields = {event.field: (mark, event) for mark, event in reversed(case.facts.every(KvBlocks))}
    if not {"block_size", "max_block_count"} <= fields.keys():
        return None
    (of_size, size), (of_count, count) = fields["block_size"], fields["max_block_count"]
    if not size.value or not count.value:
        return None
    tokens = case.turbomind.defaults("").get("cache_block_seq_len", Settings().cache_block_seq_len)
    # Since 0.2.2; before, the ratio was no share of the free memory. A larger one counts blocks.
    told = case.ratio if case.ratio is not None and 0 < case.ratio < 1 else None
    ratio = told or Settings().cache_max_entry_count
    weights = case.turbomind.weights(case.model, case.tp or 1) if case.model else None
    return LoggedCache(
        size=size.value * count.value,
        free=round(size.value * count.value / ratio),
        ratio=ratio,
        assumed=told is None,
        # The vision tower came after the cache.
        weights=weights.total - weights.vision if weights else 0,
        total=case.gpu.usable if case.gpu else 0,
        lines=(
            evidence(of_size, f"bytes of one KV block ({tokens} tokens, all layers)"),
            evidence(of_count, "how many blocks the cache has"),
        ),
        blocks=f"{count.value} blocks of {format_bytes(size.value)}, ",
    )


def with_cache(case: LogCase, answer: RuleAnswer, cache: LoggedCache | None) -> RuleAnswer:
    """An answer with what the log says of the cache, and of an engine that each rank started."""
    if cache is not None:
        answer = replace(
            answer,
            why=(*answer.why, *cache.story(case.tp or 1)),
            held=(*answer.held, *cache.holders()),
            evidence=(*answer.evidence, *cache.lines),
        )
    ranks = case.facts.subject.ranks
    if ranks is None or (case.tp or 1) < 2:
        return answer
    count, place = ranks
    started = evidence_at(place, f"{count} processes of one program")
    return replace(
        answer,
        why=(
            *answer.why,
            f"a rank launcher started the program {count} times, and each start builds a whole"
            f" engine with tp {case.tp} on the same cards: {count} models in the place of one",
        ),
        evidence=(*answer.evidence, started),
        changes=(_START_ONCE, *answer.changes),
        by_others=0,
    )


def lower_ratio(case: LogCase) -> tuple[str, ...]:
    """Changes that leave more of a card's memory for the buffers and requests after the cache."""
    runs = case.ratio or float(str(case.turbomind.defaults("")["cache_max_entry_count"]))
    lower = [f"{ratio:g}" for ratio in _RATIOS if ratio < runs][:2]
    if not lower:
        return (
            f"not the cache: it had only {runs:g} of what was free. More GPUs (--tp), a"
            " quantised variant, freer cards, a smaller --session-len and --max-batch-size",
        )
    return (
        f"a lower cache_max_entry_count: {', then '.join(lower)}",
        "fewer image tiles (max_dynamic_patch) or smaller images",
    )
