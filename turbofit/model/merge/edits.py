"""What is done to one tensor on its way: the arithmetic of peft's merge, and rows that are added.

Each edit takes a torch tensor (CPU) in the dtype of the result and gives the changed one. The
order of operations and their dtypes are those of ``PeftModel.from_pretrained(base, adapter)
.merge_and_unload()`` in peft 0.21 on a CPU, which keeps the adapter in float32:

- a linear layer's delta is added in float32 and rounded once,
- an embedding's delta is rounded before it is added,
- DoRA's product is computed in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, Protocol

from turbofit.model.merge.adapter import Lora
from turbofit.model.merge.tensors import TensorFile, torch_library

__all__ = ["AddBias", "AddLora", "Edit", "GrowRows"]


#: Rows that are added up at once: a whole table in float64 would be four times as large.
_BLOCK: Final = 1024


class Edit(Protocol):
    """A change of one tensor."""

    def __call__(self, weight: Any) -> Any:
        """The changed tensor; it may be the same one, changed in place."""


class AddLora(NamedTuple):
    """``W + s·B·A``; with ``transposed`` the layer keeps its weight as (in, out)."""

    store: TensorFile
    lora: Lora
    transposed: bool = False

    def __call__(self, weight: Any) -> Any:
        """``weight`` is (out, in), an embedding's (rows, width)."""
        lora = self.lora
        a, b = (_wide(self.store.read(name)) for name in (lora.a, lora.b))
        delta = b @ a
        del a, b
        if self.transposed or lora.embedding:
            delta = delta.T
        delta *= lora.scaling
        if lora.embedding:
            weight += delta.to(weight.dtype)
        elif lora.magnitude is None:
            weight += delta
        else:
            return self._dora(weight, delta)
        return weight

    def _dora(self, weight: Any, delta: Any) -> Any:
        """Each row of W + delta, scaled to the learnt magnitude."""
        torch = torch_library()
        assert self.lora.magnitude is not None
        magnitude = _wide(self.store.read(self.lora.magnitude)).reshape(-1)
        summed = weight + delta
        rows = summed.T if self.transposed else summed
        factor = (magnitude / torch.linalg.norm(rows, dim=1)).view(-1, 1)
        factor = factor.T if self.transposed else factor
        return (factor * summed).to(weight.dtype)


class AddBias(NamedTuple):
    """``lora_bias``: the bias of B, scaled, onto the layer's."""

    store: TensorFile
    lora: Lora

    def __call__(self, weight: Any) -> Any:
        """``weight`` is the layer's bias, (out,)."""
        assert self.lora.bias is not None
        weight += _wide(self.store.read(self.lora.bias)) * self.lora.scaling
        return weight


class GrowRows(NamedTuple):
    """Rows for added tokens, up to ``rows``: each is the mean of those that were there."""

    rows: int

    def __call__(self, weight: Any) -> Any:
        """``weight`` is (rows, width)."""
        torch = torch_library()
        total = sum(part.double().sum(dim=0) for part in weight.split(_BLOCK))
        mean = (total / weight.shape[0]).to(weight.dtype)
        grown = torch.empty((self.rows, weight.shape[1]), dtype=weight.dtype)
        grown[: weight.shape[0]] = weight
        grown[weight.shape[0] :] = mean
        return grown


def _wide(tensor: Any) -> Any:
    """A matrix of the adapter as peft holds it: float32 whatever the file says."""
    return tensor.float()
