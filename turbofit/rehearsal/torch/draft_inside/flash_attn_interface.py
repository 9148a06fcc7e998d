"""A stand-in for FlashAttention-3: its kernels do nothing here, and it allocates what they take.

LMDeploy imports it for drafts alone, since this folder is on no other process's path. Sizes as in
hopper/flash_api.cpp (``mha_fwd``) of Dao-AILab/flash-attention. A kernel of LMDeploy's decides
which tokens of a draft are accepted; here none is.
"""

from typing import Any, Final

import torch
from lmdeploy.pytorch.backends.cuda import rejection_sampling

from turbofit.core.units import round_up
from turbofit.memory.pytorch.activations import attention_parts

_TORCH: Any = torch
#: Vectors of 32-bit integers, one entry for each sequence of a batch, and the alignment of each.
_VECTORS: Final = 4


def flash_attn_varlen_func(q: Any, k: Any, v: Any, **_: object) -> Any:  # noqa: ARG001
    """Return the output of a prefill: tokens x heads x channels."""
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    _sums = q.new_empty((q.shape[1], q.shape[0]), dtype=_TORCH.float32)
    return out


def flash_attn_with_kvcache(q: Any, k_cache: Any, v_cache: Any, **_: object) -> Any:
    """Return the output of a step: sequences x tokens x heads x channels."""
    batch, tokens, heads = q.shape[:3]
    kv_heads, channels = k_cache.shape[-2], v_cache.shape[-1]
    processors = _TORCH.cuda.get_device_properties(q.device).multi_processor_count
    parts = attention_parts(kv_heads, processors)
    out, each = q.new_empty((batch, tokens, heads, channels)), (parts, batch, heads, tokens)
    shapes = [each[1:], (*each, channels), each] if parts > 1 else [each[1:]]
    _sums = [q.new_empty(shape, dtype=_TORCH.float32) for shape in shapes]
    return out


def get_scheduler_metadata(batch_size: int, *_: object, **__: object) -> Any:
    """Return the plan of a step's kernel."""
    return _TORCH.empty(
        _VECTORS * round_up(batch_size, _VECTORS) + 1, dtype=_TORCH.int32, device="cuda"
    )


def _rejected(draft_token_ids: Any) -> tuple[Any, Any, Any]:
    """Return tokens of each sequence, of which the first is valid, the rejected, and the last."""
    batch, tokens = draft_token_ids.shape
    output = draft_token_ids.new_full((batch, tokens + 1), -1)
    output[:, 0] = 0
    return output, draft_token_ids.new_full((batch,), tokens), draft_token_ids.new_zeros((batch,))


rejection_sampling._allocate_outputs = _rejected
