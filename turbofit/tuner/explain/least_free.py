"""The free memory at the cache's start with which a start that serves would no longer do so."""

from __future__ import annotations

from collections.abc import Callable

from turbofit.core.units import MIB
from turbofit.memory.account import Account
from turbofit.memory.start_outcome import outcome_at

__all__ = ["least_free_words"]

#: Steps of the forecast in which the first death below it is looked for.
_STEPS = 128


def least_free_words(with_free: Callable[[int], Account], free: int, ratio: float) -> str | None:
    """What becomes of a start that serves where less is free; None where nothing else does.

    A cache that is small enough can cut sessions so far that it serves again: the first end below
    the forecast counts, found to 1 MiB; whole blocks of the cache leave a little more or less.

    Args:
        with_free: the account of so many bytes free when the cache is sized.
        free: bytes that are forecast, or that a log told.
        ratio: the cache's.
    """

    def ends(less: int) -> bool:
        return not outcome_at(with_free(less), ratio).serves

    steps = (free * step // _STEPS for step in range(_STEPS - 1, 0, -1))
    low = next((less for less in steps if ends(less)), None)
    if low is None:
        return None
    end = "never start" if outcome_at(with_free(low), ratio).kind == "hang" else "die"
    high = low + free // _STEPS
    while high - low > MIB:
        middle = (low + high) // 2
        low, high = (middle, high) if ends(middle) else (low, middle)
    return (
        f"with less than about {high // MIB:,} MiB free when the cache is sized it would {end};"
        f" here it has {free // MIB:,} MiB"
    )
