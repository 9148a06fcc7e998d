"""Gated delta nets on TurboMind: activations of a forward, and the workspace of its kernels.

Most layers of a hybrid model have one in place of attention. The kernels for Hopper and for
consumer Blackwell take a workspace for the prompts of a forward from a pool of the engine's own
thread, once for each phase; those before Hopper take none. Long sequences are cut into segments
that run side by side, each with a state. Source: LMDeploy's GatedDeltaNetLayer.cc and
kernels/linear_attn (plan.cc of each architecture).
"""

from __future__ import annotations

from functools import lru_cache
from math import log2, sqrt

from turbofit.core.model import DeltaDims
from turbofit.core.plan import Settings
from turbofit.core.units import HALF, round_up
from turbofit.memory.turbomind.constants import DeltaKernel

__all__ = ["input_rows", "meeting_workspace", "token_bytes", "workspace"]

_FLOAT = 4
_TENSOR_MAP = 128
#: Descriptors of a sequence at most, and of a head of it.
_SEQUENCE_MAPS = 16
_HEAD_MAPS = 4
#: A segment's state in 32 bits, and as much again: two of 16 bits, or one more of 32.
_SEGMENT_BYTES = 8


def input_rows(delta: DeltaDims) -> int:
    """Outputs of the fused input projections: queries, keys, values, output gate, two gates."""
    return delta.channels + delta.values + 2 * delta.value_heads


def token_bytes(delta: DeltaDims, tp: int) -> int:
    """Bytes that one token holds in a delta net, beside the residual stream.

    Projections, two gates in 32 bits, the output, and what the convolution made of the inputs.
    """
    sixteen = input_rows(delta) + delta.values + delta.channels
    return (sixteen * HALF + 2 * delta.value_heads * _FLOAT) // tp


def workspace(
    delta: DeltaDims, settings: Settings, kernel: DeltaKernel, sm_count: int, tokens: int
) -> int:
    """Bytes for a forward with one prompt of so many tokens, as in LMDeploy's warm-up."""
    heads = delta.value_heads // settings.tp
    if not kernel.chunk or not tokens:
        return 0
    chunks = -(-tokens // kernel.chunk)
    segments = -(-chunks // _segment(kernel, heads, chunks, sm_count))
    cut = heads <= _most_heads(kernel, chunks)
    states = _states(delta, heads, segments) if cut else 0
    return _whole(delta, settings, kernel, tokens) + states + _maps(heads, 1)


def meeting_workspace(
    delta: DeltaDims, settings: Settings, kernel: DeltaKernel, sm_count: int, tokens: int
) -> int:
    """The most for a forward of so many tokens, whichever prompts meet in it; over."""
    if not kernel.chunk:
        return 0
    heads = delta.value_heads // settings.tp
    segments = _most_segments(kernel, heads, sm_count, tokens, settings.max_batch_size)
    batch = settings.max_batch_size
    maps = _maps(heads, batch) + delta.layers * batch * _TENSOR_MAP
    return _whole(delta, settings, kernel, tokens) + _states(delta, heads, segments) + maps


def _whole(delta: DeltaDims, settings: Settings, kernel: DeltaKernel, tokens: int) -> int:
    """Summed decays in 32 bits, and each chunk's resolvent."""
    heads = delta.value_heads // settings.tp
    return tokens * (round_up(heads, 4) * _FLOAT + heads * kernel.chunk * HALF)


def _maps(heads: int, sequences: int) -> int:
    """Descriptors of what the kernels copy, over."""
    return sequences * (_SEQUENCE_MAPS + _HEAD_MAPS * heads) * _TENSOR_MAP


def _states(delta: DeltaDims, heads: int, segments: int) -> int:
    return segments * heads * delta.key_dim * delta.value_dim * _SEGMENT_BYTES


def _segment(kernel: DeltaKernel, heads: int, chunks: int, sm_count: int) -> int:
    """Chunks of a segment: a power of two."""
    scaled = sqrt(heads * chunks / sm_count) * kernel.segment
    return max(4, 1 << max(0, round(log2(max(1.0, scaled)))))


def _most_heads(kernel: DeltaKernel, longest: int) -> int:
    """Heads of all sequences up to which these are cut: more beside a long one, in chunks."""
    if longest < kernel.cut_long_chunks:
        return kernel.cut_heads
    return max(kernel.cut_heads, kernel.cut_long_heads)


@lru_cache(maxsize=4096)
def _most_segments(
    kernel: DeltaKernel, heads: int, sm_count: int, tokens: int, sequences: int
) -> int:
    """The most segments of a forward: a long sequence, and as many short ones as keep it cut.

    Short sequences have one chunk of two tokens each; where the batch allows fewer of them, they
    are longer.
    """
    most = 0
    for longest in range(1, -(-tokens // kernel.chunk) + 1):
        limit = _most_heads(kernel, longest)
        if heads > limit:
            continue
        left = tokens - (longest - 1) * kernel.chunk - 1
        others = min(int(longest * (limit / heads - 1)), left // 2)
        segment = _segment(kernel, heads, longest, sm_count)
        short = min(others, sequences - 1)
        most = max(most, -(-longest // segment) + short + (others - short) // segment)
    return most
