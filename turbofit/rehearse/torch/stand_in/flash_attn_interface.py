"""A stand-in for FlashAttention-3 on pretend GPUs: it allocates the same, and computes nothing.

LMDeploy's PyTorch engine does not start speculative decoding without that package, whose kernels
run on no pretend card. Only processes on pretend GPUs find this file, and only with a draft. Sizes
are those of hopper/flash_api.cpp and hopper/heuristics.h (Dao-AILab/flash-attention 0251105a).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from turbofit.memory.pytorch.activations import splits


def flash_attn_varlen_func(q: Any, k: Any, v: Any, **_: Any) -> Any:  # noqa: ARG001
    """Attention of a prefill: the output, and a sum at 32 bits for each query and head."""
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    q.new_empty((q.shape[-2], q.shape[0]), dtype=torch.float32)
    return out


@cache
def _reject_none() -> None:
    """Reject no drafted token: the Triton kernels that would say which do not run here."""
    from lmdeploy.pytorch.backends.cuda import rejection_sampling

    sampling: Any = rejection_sampling
    allocate = sampling._allocate_outputs

    def zeroed(draft_token_ids: Any) -> Any:
        return tuple(one.zero_() for one in allocate(draft_token_ids))

    sampling._allocate_outputs = zeroed


def flash_attn_with_kvcache(q: Any, k_cache: Any, v_cache: Any, **_: Any) -> Any:
    """Attention of a decoding step: the output, and each part's at 32 bits."""
    _reject_none()
    batch, length, heads, _dim = q.shape
    out = q.new_empty((batch, length, heads, v_cache.shape[-1]))
    sums = [q.new_empty((batch, heads, length), dtype=torch.float32)]
    count = splits(k_cache.shape[-2], torch.cuda.get_device_properties(0).multi_processor_count)
    if count > 1:
        shape = (count, batch, heads, length)
        sums.append(q.new_empty((*shape, v_cache.shape[-1]), dtype=torch.float32))
        sums.append(q.new_empty(shape, dtype=torch.float32))
    return out


def get_scheduler_metadata(batch: int, *given: Any, **_: Any) -> Any:
    """Four numbers of 32 bits for each sequence, and a semaphore; the lengths are the sixth."""
    return given[5].new_zeros(4 * (-(-batch // 4) * 4) + 1, dtype=torch.int32)
