"""A stand-in for FlashAttention-3: it computes nothing, and allocates what the kernels allocate.

Only processes of an engine with a draft have this folder on their path. The sizes are those of
hopper/flash_api.cpp (``mha_fwd``) of Dao-AILab/flash-attention. On a real card a kernel of LMDeploy
decides which tokens of a draft are accepted; on a pretend GPU no token is accepted.
"""

from typing import Any, Final

import torch
from lmdeploy.pytorch.backends.cuda import rejection_sampling

from turbofit.core.units import round_up
from turbofit.memory.pytorch.activations import attention_parts

_TORCH: Any = torch
#: How many vectors the metadata has. A vector has a 32-bit integer for each sequence of a batch.
#: Its length is rounded up to a multiple of four, too.
_VECTORS: Final = 4


def flash_attn_varlen_func(q: Any, k: Any, v: Any, **_: object) -> Any:  # noqa: ARG001
    """Return the output of a prefill; its shape is tokens x heads x channels."""
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    _sums = q.new_empty((q.shape[1], q.shape[0]), dtype=_TORCH.float32)
    return out


def flash_attn_with_kvcache(q: Any, k_cache: Any, v_cache: Any, **_: object) -> Any:
    """Return the output of a step; its shape is sequences x tokens x heads x channels."""
    batch, tokens, heads = q.shape[:3]
    kv_heads, channels = k_cache.shape[-2], v_cache.shape[-1]
    processors = _TORCH.cuda.get_device_properties(q.device).multi_processor_count
    parts = attention_parts(kv_heads, processors)
    out, each = q.new_empty((batch, tokens, heads, channels)), (parts, batch, heads, tokens)
    shapes = [each[1:], (*each, channels), each] if parts > 1 else [each[1:]]
    _sums = [q.new_empty(shape, dtype=_TORCH.float32) for shape in shapes]
    return out


def get_scheduler_metadata(batch_size: int, *_: object, **__: object) -> Any:
    """Return the metadata of a step's kernel: a vector of 32-bit integers."""
    return _TORCH.empty(
        _VECTORS * round_up(batch_size, _VECTORS) + 1, dtype=_TORCH.int32, device="cuda"
    )


def _rejected(draft_token_ids: Any) -> tuple[Any, Any, Any]:
    """Return three tensors for a batch in which each draft token is rejected.

    The first tensor has the tokens of each sequence; only the first token is valid. The second has
    the number of rejected tokens, and the third has the last token.
    """
    batch, tokens = draft_token_ids.shape
    output = draft_token_ids.new_full((batch, tokens + 1), -1)
    output[:, 0] = 0
    return output, draft_token_ids.new_full((batch,), tokens), draft_token_ids.new_zeros((batch,))


rejection_sampling._allocate_outputs = _rejected
