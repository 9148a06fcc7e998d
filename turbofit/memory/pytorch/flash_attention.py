"""What FlashAttention-3 takes in a decoding step of several tokens a sequence.

Source: hopper/flash_api.cpp and hopper/heuristics.h of Dao-AILab/flash-attention, 0251105a.
"""

from __future__ import annotations

__all__ = ["splits"]

#: Multiprocessors are filled to so much, or nothing is split; of the best way so much is enough.
_FULL, _ENOUGH = 0.8, 0.85
_MOST = 128


def splits(kv_heads: int, processors: int) -> int:
    """Parts into which the keys and values of a long sequence are split, each with an output.

    Over: of queries that fill more than one tile there are fewer, and none of short sequences.
    """
    if kv_heads >= _FULL * processors:
        return 1
    waves = [kv_heads * count / processors for count in range(1, min(_MOST, processors) + 1)]
    filled = [one / -(-one // 1) for one in waves]
    return next(i for i, one in enumerate(filled, 1) if one >= _ENOUGH * max(filled))
