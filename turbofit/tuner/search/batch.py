"""How many requests one engine runs at once, where nobody says it, or more than it holds.

The smallest batch that reaches nearly all of the requests a second that the forecast gives to any:
more rows cost memory for buffers and for images that meet in one forward. The cache bounds the
batch, since the forecast counts on every request's tokens there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from turbofit.memory.vision_load import VisionLoad
from turbofit.tuner.search.sizing import Sizer
from turbofit.tuner.speed.throughput import request_tokens

__all__ = ["SizedBatch", "most_held", "with_best_batch"]

#: Of the best requests a second; a larger batch for the rest is not worth its memory.
_NEARLY_ALL: Final = 0.99
#: With the goal of context a batch may cost this share of the tokens.
_TOKENS_KEPT: Final = 0.99


class SizedBatch(NamedTuple):
    """A shape with its batch, and whether more memory would run more requests at once."""

    sizer: Sizer
    wants_cache: bool


def with_best_batch(sizer: Sizer, session_len: int, requested_load: VisionLoad) -> SizedBatch:
    """The same shape with the smallest batch that reaches nearly the best requests a second.

    Args:
        sizer: of the shape with one request at once.
        session_len: the context that one request at once leaves; no batch shortens it.
        requested_load: the workload's images, which the forecast is for.

    Returns:
        The shape with that batch, or with a smaller one where memory does not do for it; with the
        user's own where that is set.
    """
    fixed = sizer.request.fixed.get("max_batch_size")
    if isinstance(fixed, int):
        return SizedBatch(sizer.with_batch(fixed), wants_cache=False)
    alone = sizer.outcome(session_len)
    if alone.short or alone.ratio is None:
        return SizedBatch(sizer, wants_cache=True)
    need = request_tokens(requested_load)
    most = min(sizer.most_batch, max(1, alone.kv_tokens // need))

    def rate(batch: int) -> float:
        some = sizer.with_batch(batch)
        settings = some.settings(session_len)
        return sum(
            some.speed(settings, gpus, requested_load, alone.kv_tokens).requests_per_second
            for gpus in some.distinct
        )

    def holds(batch: int) -> bool:
        some = sizer.with_batch(batch)
        outcome = some.outcome(session_len)
        if outcome.short or outcome.kv_tokens < batch * need:
            return False
        by_tokens = sizer.request.workload.goal == "context"
        least = alone.kv_tokens * _TOKENS_KEPT if by_tokens else 0
        return outcome.kv_tokens >= max(least, min(session_len, alone.kv_tokens))

    wanted = _smallest(rate, most)
    chosen = wanted if wanted == 1 or holds(wanted) else _largest(holds, wanted)
    bound = most < sizer.most_batch and wanted == most
    return SizedBatch(sizer.with_batch(chosen), wants_cache=bound or chosen < wanted)


def most_held(sizer: Sizer, wanted: int) -> int:
    """The most requests at once that one engine of a shape holds, fewer than are wanted of it."""

    def holds(batch: int) -> bool:
        some = sizer.with_batch(batch)
        session_len = some.session_len()
        return some.held(some.outcome(session_len), session_len) >= batch

    return _largest(holds, wanted) if holds(1) else 0


def _smallest(rate: Callable[[int], float], most: int) -> int:
    """The smallest batch up to ``most`` with nearly the best rate.

    The rate grows up to one maximum, which is looked for among powers of two and ``most``.
    """
    tried = [1 << k for k in range(most.bit_length()) if 1 << k < most] + [most]
    rates = [rate(batch) for batch in tried]
    enough = max(rates) * _NEARLY_ALL
    first = next(i for i, one in enumerate(rates) if one >= enough)
    low, high = tried[first - 1] if first else 0, tried[first]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if rate(middle) >= enough else (middle, high)
    return high


def _largest(holds: Callable[[int], bool], beyond: int) -> int:
    """The largest batch that holds; one does, and ``beyond`` does not."""
    low, high = 1, beyond
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
