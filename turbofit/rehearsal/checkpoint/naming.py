"""Names a model's tensors as a checkpoint does, and says how it stores them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from turbofit.core.errors import UsageError
from turbofit.core.json_types import JsonObject
from turbofit.core.model import Quantization
from turbofit.model.parameters import is_packed
from turbofit.model.tensors import Tensor

#: The name, safetensors type and shape of a tensor.
Entry = tuple[str, str, tuple[int, ...]]
_GROUP: Final = 128
#: The number of weights that share an exponent in mxfp4, or a scale in compressed-tensors.
_MX_GROUP: Final = 32


class Writer(NamedTuple):
    """Names a model's tensors, given by their roles, and says how they are stored."""

    tensors: Mapping[str, Tensor]
    dtype: str
    quantization: Quantization | None

    def entries(self, names: JsonObject, at: str = "", layer: int | None = None) -> Iterator[Entry]:
        """The tensors of a block of names; with ``layer`` only those of that layer."""
        for name, joined in self._joined(names, layer).items():
            if isinstance(joined, list):
                yield from self._stored(at, name, joined)
            elif layer is not None:
                yield from self._experts(joined, at + joined["at"], layer)
            else:
                yield from self._layers(joined, at + joined["at"])

    def _joined(self, names: JsonObject, layer: int | None) -> dict[str, Any]:
        """Tensors by their names, and inner blocks by their roles.

        Several tensors share a name if a checkpoint joins them.
        """
        found: dict[str, Any] = {}
        for role, name in names.items():
            tensor = self.tensors.get(names.get("of", "") + role)
            if isinstance(name, dict):
                found[role] = name
            elif tensor is not None and (layer is None or layer in (tensor.layers or ())):
                found.setdefault(name, []).append(tensor)
        return found

    def _layers(self, names: JsonObject, at: str) -> Iterator[Entry]:
        """The tensors of a block for each layer in turn, or once if they belong to no layer."""
        groups = [one for one in self._joined(names, None).values() if isinstance(one, list)]
        last = [tensor.layers[-1] for group in groups for tensor in group if tensor.layers]
        if not last:
            yield from self.entries(names, at)
        for i in range(max(last, default=-1) + 1):
            yield from self.entries(names, f"{at}{i}.", i)

    def _experts(self, names: JsonObject, at: str, layer: int) -> Iterator[Entry]:
        """The experts of a layer, each with its own tensors, or all of them stacked in two."""
        tensors = [one for group in self._joined(names, layer).values() for one in group]
        packing, stacked = self.quantization, names.get("stacked")
        if stacked and (packing is None or packing.method == "mxfp4"):
            for name, split in (("gate_up_proj", "columns"), ("down_proj", "rows")):
                joined = [tensor for tensor in tensors if tensor.split == split]
                if joined:
                    yield from self._stacked(at + name, joined, outputs=stacked == "outputs")
        else:
            for i in range(tensors[0].copies if tensors else 0):
                yield from self.entries(names, f"{at}{i}.", layer)

    def _stacked(self, name: str, joined: list[Tensor], *, outputs: bool) -> Iterator[Entry]:
        """All experts of a layer in one tensor."""
        (outs, ins), experts = _shape(joined), joined[0].copies
        if self.quantization is not None:
            groups = ins // _MX_GROUP
            yield f"{name}_blocks", "U8", (experts, outs, groups, _MX_GROUP // 2)
            yield f"{name}_scales", "U8", (experts, outs, groups)
        else:
            yield name, self.dtype, (experts, outs, ins) if outputs else (experts, ins, outs)
        if joined[0].bias:
            yield f"{name}_bias", self.dtype, (experts, outs)

    def _stored(self, at: str, name: str, joined: list[Tensor]) -> Iterator[Entry]:
        """The tensors under one name: a module's weight and bias, or a tensor by itself."""
        how, _, alone = name.rpartition(" ")
        shape, full = _shape(joined), at + alone
        if how:
            yield full, _ALONE[how] or self.dtype, shape
            return
        packed = is_packed(joined[0], self.quantization) and not _exempt(full, self.quantization)
        method = self.quantization.method if packed and self.quantization else ""
        yield from _LINEARS[method](full, shape, self.dtype)
        if joined[0].bias:
            yield f"{full}.bias", self.dtype, shape[:1]


def need_names(names: JsonObject, tensors: Iterable[str]) -> None:
    """Raises a UsageError if the names lack one of these tensors' roles."""
    unnamed = [role for role in tensors if role not in set(_roles(names))]
    if unnamed:
        raise UsageError(
            f"a file of presets/checkpoints has no name for {', '.join(unnamed)}",
            hint="docs/adding.md says how names are written",
        )


def _roles(names: JsonObject) -> Iterator[str]:
    for role, name in names.items():
        if isinstance(name, dict):
            yield from _roles(name)
        yield names.get("of", "") + role


#: Words before the name of a tensor that is not a module's weight, with its type.
_ALONE: Final = {"bare": "", "float32": "F32"}


def _shape(joined: list[Tensor]) -> tuple[int, ...]:
    return (sum(tensor.shape[0] for tensor in joined), *joined[0].shape[1:])


def _exempt(name: str, quantization: Quantization | None) -> bool:
    """Whether the checkpoint leaves a decoder's linear layer in 16 bits."""
    match = re.search(r"layers\.(\d+)\.(.+)", name)
    if quantization is None or not quantization.unconverted or match is None:
        return False
    return quantization.exempts(match[2], int(match[1]))


def _plain(name: str, shape: tuple[int, ...], dtype: str) -> Iterator[Entry]:
    """A norm, or a linear layer that is not packed."""
    yield f"{name}.weight", dtype, shape


def _awq(name: str, shape: tuple[int, ...], _: str) -> Iterator[Entry]:
    outs, ins = shape
    yield f"{name}.qweight", "I32", (ins, outs // 8)
    yield f"{name}.qzeros", "I32", (ins // _GROUP, outs // 8)
    yield f"{name}.scales", "F16", (ins // _GROUP, outs)


def _fp8(name: str, shape: tuple[int, ...], _: str) -> Iterator[Entry]:
    outs, ins = shape
    yield f"{name}.weight", "F8_E4M3", shape
    yield f"{name}.weight_scale_inv", "BF16", (-(-outs // _GROUP), -(-ins // _GROUP))


def _int4(name: str, shape: tuple[int, ...], dtype: str) -> Iterator[Entry]:
    outs, ins = shape
    yield f"{name}.weight_packed", "I32", (outs, ins // 8)
    yield f"{name}.weight_scale", dtype, (outs, ins // _MX_GROUP)
    yield f"{name}.weight_shape", "I32", (2,)


#: Functions that yield a linear layer's tensors, by the method that packs it.
_LINEARS: Final = {"": _plain, "awq": _awq, "fp8": _fp8, "compressed-tensors": _int4}
