"""What a full cache does: how many requests run, and how many tokens are computed again.

LMDeploy admits a request when its prompt fits, and evicts the youngest when the cache is full; an
evicted request computes its prompt and what it had answered again. So more requests run than could
all end in the cache, for work that is thrown away: speed falls after its maximum.
"""

from __future__ import annotations

from math import exp
from typing import NamedTuple

__all__ = ["Crowd", "crowd_of"]

#: Answers of one length leave room for more requests than could all end; the more their lengths
#: differ, the sooner evictions begin. Beyond this there is nothing to tell apart.
_LEAST_ROOM = 0.1


class Crowd(NamedTuple):
    """Requests that run on average, and the share of its answer that each computes again."""

    running: float
    again: float


def crowd_of(
    admitted: float, fitting: float, room: float, output: float, recomputed_share: float
) -> Crowd:
    """How a cache is shared; fitted to `tests/tuner/speed/simulated_cache.py`.

    Args:
        admitted: requests that the batch lets in.
        fitting: requests whose prompt and whole answer the cache holds, one at least.
        room: by which share more requests fit at their mean length than at their full one.
        output: tokens of an answer. The more requests end while one is answered, the fewer are
            evicted.
        recomputed_share: the largest share of an answer that is computed again.
    """
    if admitted <= fitting:
        return Crowd(admitted, 0.0)
    evicting = 1 - exp((1 - admitted / fitting) / max(room, _LEAST_ROOM))
    running = min(admitted, fitting * (1 + room * evicting))
    return Crowd(running, evicting * recomputed_share / (1 + fitting / output))
