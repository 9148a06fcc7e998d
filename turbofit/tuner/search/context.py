"""The longest context that a cache holds whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from turbofit.core.units import round_up

__all__ = ["CONTEXT_STEP", "longest_held"]

#: Contexts that are looked at are multiples of this.
CONTEXT_STEP: Final = 64


def longest_held(held: Callable[[int], int], low: int, high: int) -> int:
    """The longest context between two of which the shorter is held and the longer is not.

    A longer context leaves no more tokens, so that each look bounds the answer on both sides: no
    context is held beyond the tokens that a shorter one leaves, and one of as many tokens as a
    longer one leaves is held. Two or three looks do, where halving takes ten.

    Args:
        held: the KV tokens that the cache holds with a context; 0 where the engine does not start.
        low: a context that is held.
        high: a longer one that is not.

    Returns:
        A multiple of 64, or ``low``.
    """
    guess = held(high) // CONTEXT_STEP * CONTEXT_STEP
    while high - low > CONTEXT_STEP:
        half = (low + high) // 2 // CONTEXT_STEP * CONTEXT_STEP
        middle = guess if low < guess < high else half
        if middle <= low:
            break
        tokens = held(middle)
        if tokens >= middle:
            low, high = middle, min(high, round_up(tokens + 1, CONTEXT_STEP))
        else:
            high = middle
        guess = tokens // CONTEXT_STEP * CONTEXT_STEP
    return low
