"""A stand-in for FlashMLA: it computes nothing, and allocates what the kernel allocates.

The sizes are those of csrc/sm90 of deepseek-ai/FlashMLA. As with the stand-in beside it, only
processes of an engine with a draft have this folder on their path.
"""

from typing import Any, Final

import torch

from turbofit.memory.pytorch.activations import latent_parts

_TORCH: Any = torch
#: The numbers of a group of multiprocessors in the metadata.
_NUMBERS: Final = 8


def _parts(heads: int, device: Any) -> int:
    properties = _TORCH.cuda.get_device_properties(device)
    return latent_parts(heads, properties.multi_processor_count)


def get_mla_metadata(lengths: Any, heads: int, **_: object) -> tuple[Any, Any]:
    """Return the work of each group of multiprocessors, and where each sequence's parts begin."""
    groups = _parts(heads, lengths.device)
    begins = lengths.new_zeros((len(lengths) + 1,), dtype=_TORCH.int32)
    return begins.new_zeros((groups, _NUMBERS)), begins


def flash_mla_with_kvcache(q: Any, head_dim_v: int, **_: object) -> tuple[Any, Any]:
    """Return the output of a step, sequences x tokens x heads x channels, and its weights."""
    batch, tokens, heads = q.shape[:3]
    parts = batch + _parts(tokens * heads, q.device)
    out = q.new_empty((batch, tokens, heads, head_dim_v))
    weights = q.new_empty((batch, heads, tokens), dtype=_TORCH.float32)
    _sums = [
        q.new_empty((parts, heads, tokens, *channels), dtype=_TORCH.float32)
        for channels in ((), (head_dim_v,))
    ]
    return out, weights
