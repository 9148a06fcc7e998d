"""FlashAttention-3 and FlashMLA, with which LMDeploy decodes several tokens of a sequence at once.

Source: hopper/ (flash_api.cpp, heuristics.h, setup.py) of Dao-AILab/flash-attention, 0251105a;
LMDeploy pytorch/backends/cuda/attention/__init__.py, pytorch/configurations/utils.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from turbofit.core.draft import Draft
from turbofit.core.machine import Gpu
from turbofit.core.model import TextDims
from turbofit.memory.shared_terms import HOPPER, capability_of

__all__ = ["needed_modules", "splits", "without_kernels"]

#: Compute capabilities from the first on and below the second.
_KERNELS = ((8, 0), (10, 0))

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


def needed_modules(text: TextDims) -> tuple[str, ...]:
    """What must be installed beside LMDeploy, each with the module that it is imported as last.

    Args:
        text: the draft's dims, or those of what it drafts for.
    """
    if text.mla is not None:
        return ("FlashMLA's flash_mla",)
    return ("FlashAttention-3's flash_attn_interface",)


def without_kernels(draft: Draft, gpus: Iterable[Gpu]) -> str | None:
    """Why these cards do not verify drafts; None where they do.

    LMDeploy asks for compute capability 8.0 alone. FlashAttention-3 is compiled for sm_80, which
    all of 8 run, and for sm_90a. Latents have FlashMLA, on Hopper; without it LMDeploy starts, and
    its Triton kernel decodes one token a sequence.
    """
    first, end = _KERNELS
    name = "FlashAttention-3"
    if draft.text.mla is not None:
        first, name = HOPPER, "FlashMLA"
    for gpu in gpus:
        if not first <= capability_of(gpu) < end:
            a, b = capability_of(gpu)
            where = "8 and 9" if first < HOPPER else "9"
            return (
                f"{name}, with which LMDeploy verifies drafts, has kernels for compute capability"
                f" {where}; {gpu.name} has {a}.{b}"
            )
    return None
