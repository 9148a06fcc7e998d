"""TurboMind's cache as a log describes it: its size, the free memory, and the card's holders."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from turbofit.core.plan import Settings
from turbofit.core.struct import Struct
from turbofit.core.units import GIB, format_bytes
from turbofit.diagnose.answer import Evidence, Holding
from turbofit.diagnose.case import LogCase, usable
from turbofit.diagnose.rules.draft import evidence
from turbofit.observe.log_events import CacheBudget, KvBlocks

if TYPE_CHECKING:
    from collections.abc import Iterator

START_ONCE: Final = (
    "start the engine once (plain python, or --nproc_per_node=1), not under torchrun"
)
#: Cache ratios to try, in this order.
_RATIOS: Final = (0.5, 0.4, 0.3, 0.2)
#: LMDeploy's own default since 0.2.2.
_DEFAULT_RATIO: Final = 0.8
#: Bytes on a card that exceed the contexts and communicators of one engine.
_ENGINE_OVERHEAD: Final = 2 * GIB


class LoggedCache(Struct):
    """A cache in bytes per card, the memory that was free for it, and the weights before it.

    ``ratio`` is the log's; if ``assumed``, it is the default. ``weights`` are one rank's by the
    account, ``total`` is the memory that CUDA can allocate; each is None without model or card.
    ``blocks`` describes the blocks of an engine of 0.2 to 0.14; it is empty for a newer engine.
    """

    size: int
    free: int
    ratio: float
    weights: int | None
    total: int | None
    lines: tuple[Evidence, ...]
    assumed: bool = False
    blocks: str = ""

    @property
    def rest(self) -> int:
        """Bytes of the card that are neither weights nor free; 0 if they cannot be computed."""
        if self.weights is None or self.total is None:
            return 0
        return self.total - self.free - self.weights

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
                f" the cache was sized, though the weights take {format_bytes(self.weights or 0)} a"
                f" card at tp {tp}: about {format_bytes(self.others)} were held by somebody else"
                " (or by other copies of this engine)"
            )

    def holders(self) -> Iterator[Holding]:
        """Yields the known holders of a card's memory at the time when the cache was sized."""
        lines = tuple(row.line for row in self.lines)
        yield Holding(who="the KV cache", bytes=self.size, lines=lines)
        if self.weights is not None and self.total is not None:
            yield Holding(who="this model's weights, on each card", bytes=self.weights)
        if self.rest > 0:
            who = "CUDA contexts and everybody else, together"
            yield Holding(who=who, bytes=self.rest, lines=lines)


def logged_cache(case: LogCase) -> LoggedCache | None:
    budgets = case.facts.every(CacheBudget)
    if not budgets:
        return _of_blocks(case)
    mark, budget = budgets[0]
    weights = None
    if case.model is not None:
        weights = case.turbomind.weights(case.model, case.tp or len(budgets)).total
    return LoggedCache(
        size=budget.budget,
        free=budget.free,
        ratio=budget.ratio,
        weights=weights,
        total=usable(case.gpu) if case.gpu else None,
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
    defaults = case.turbomind.defaults("")
    tokens = defaults.get("cache_block_seq_len", Settings().cache_block_seq_len)
    told = case.ratio if case.ratio is not None and 0 < case.ratio < 1 else None
    # Before 0.2.2 the ratio was not a share of the free memory, so its default says nothing here.
    default = default_ratio(case) if case.turbomind.ratio_of_free else None
    default = default or _DEFAULT_RATIO
    bytes_of_it = size.value * count.value
    return LoggedCache(
        size=bytes_of_it,
        free=round(bytes_of_it / (told or default)),
        ratio=told or default,
        assumed=told is None,
        weights=_language_weights(case),
        total=usable(case.gpu) if case.gpu else None,
        lines=(
            evidence(of_size, f"bytes of one KV block ({tokens} tokens, all layers)"),
            evidence(of_count, "how many blocks the cache has"),
        ),
        blocks=f"{count.value} blocks of {format_bytes(size.value)}, ",
    )


def _language_weights(case: LogCase) -> int | None:
    """Bytes of the language model's weights on one rank, without the vision tower, as planned."""
    if case.model is None:
        return None
    weights = case.turbomind.weights(case.model, case.tp or 1)
    return weights.total - weights.vision


def cache_facts(
    case: LogCase, cache: LoggedCache | None
) -> tuple[list[str], list[Holding], list[Evidence]]:
    """Reasons, holders and lines of a cache, and of an engine that was started once per rank."""
    why = [*cache.story(case.tp or 1)] if cache else []
    held = [*cache.holders()] if cache else []
    lines = [*cache.lines] if cache else []
    if twice := double_start(case):
        why.append(twice[0])
        lines.append(twice[1])
    return why, held, lines


def double_start(case: LogCase) -> tuple[str, Evidence] | None:
    """A sentence and line on a rank launcher that started an engine once per GPU; else None."""
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


def default_ratio(case: LogCase) -> float | None:
    """The default ratio of the log's LMDeploy version; None if the version is not known."""
    default = case.turbomind.defaults("").get("cache_max_entry_count")
    return float(str(default)) if default and case.facts.subject.version else None


def lower_ratio(case: LogCase) -> tuple[str, ...]:
    """Changes that leave more of a card's memory for the buffers and requests after the cache."""
    runs = case.ratio or default_ratio(case) or math.inf
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
