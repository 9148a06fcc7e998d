"""Lets gated delta nets of LMDeploy's PyTorch engine run on a pretend machine, in each process.

The Triton kernels of fla run unchanged, but each kernel tries only two of up to 60 variants:
compiling all would take minutes. fla asks the card how many chunks a prefill has, and a pretend
card cannot compute this; fla gets the most chunks that the prefill's tokens and sequences can make.
TileLang's kernels are stand-ins (``torch_inside/tilelang``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

_CHUNK: Final = 64
_INDICES: Final = "prepare_chunk_indices"
_VARIANTS: Final = 2


def most_chunks(tokens: int, sequences: int, chunk: int = _CHUNK) -> int:
    """Return the most chunks of a prefill if each sequence ends in a chunk of its own."""
    return sequences + max(0, tokens - sequences) // chunk


def follow() -> None:
    """Replace functions of LMDeploy and fla that read values from the card.

    fla's function is replaced at the first forward.
    """
    from lmdeploy.pytorch.backends.cuda import gated_delta_rule as rule

    module: Any = rule
    updater: Any = module.GatedDeltaStepMetaUpdater
    update, indices = updater.update, _Indices()

    def updated(self: Any, step_context: Any, sequence_metadata: Any) -> None:
        indices.tokens = step_context.input_ids.numel()
        update(self, step_context, sequence_metadata)

    def prepared(cu_seqlens: Any) -> None:
        _replace(indices)
        indices(cu_seqlens, _CHUNK)

    updater.update = updated
    module.prepare_chunked_gated_delta_rule = prepared


class _Indices:
    """Replaces fla's function that lists, for each chunk, its sequence and its number.

    The list is zeros, made once for each forward, so nothing is read from the card.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._made: tuple[Any, int, Any] | None = None

    def __call__(self, cu_seqlens: Any, chunk_size: int, *_: Any, **__: Any) -> Any:
        import torch

        chunks = most_chunks(self.tokens, cu_seqlens.numel() - 1, chunk_size)
        if self._made is None or self._made[0] is not cu_seqlens or self._made[1] != chunks:
            zeros: Callable[..., Any] = torch.zeros
            indices = zeros((chunks, 2), dtype=cu_seqlens.dtype, device=cu_seqlens.device)
            self._made = (cu_seqlens, chunks, indices)
        return self._made[2]


def _replace(indices: _Indices) -> None:
    """Replace fla's function by `indices`, in every module of fla that has imported it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.") and getattr(module, _INDICES, indices) is not indices:
            setattr(module, _INDICES, indices)
            _fewer_variants(module)


def _fewer_variants(module: Any) -> None:
    """Leave only a few variants of each Triton kernel in a module, also of decorated kernels."""
    for kernel in list(vars(module).values()):
        while kernel is not None:
            variants = getattr(kernel, "configs", None)
            if isinstance(variants, list):
                del variants[_VARIANTS:]
            kernel = getattr(kernel, "fn", None)  # noqa: PLW2901 - the wrapped function
