"""Decides, before anything is written, what becomes of each tensor of the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from turbofit.core.errors import UsageError
from turbofit.model.merge.adapter import Adapter, Lora, WholeTensor
from turbofit.model.merge.edits import AddBias, AddLora, Edit
from turbofit.model.merge.names import TensorNames
from turbofit.model.merge.shards import Shard, ShardPiece
from turbofit.model.merge.tensors import FLOATS, StoredTensor

__all__ = ["MergePlan", "plan_pieces"]


class MergePlan:
    """The pieces of each file, by the base's names; and what the adapter brings besides.

    ``loras`` counts modules; ``replaced`` names tensors of the base that the adapter holds whole.
    """

    def __init__(self) -> None:
        self.files: list[list[ShardPiece]] = []
        self.besides: dict[str, WholeTensor] = {}
        self.loras = 0
        self.replaced: set[str] = set()


def plan_pieces(
    shards: Sequence[Shard], adapter: Adapter | None, dtype: str | None, *, projector: bool
) -> MergePlan:
    """Assign every tensor of the adapter to one of the base.

    Args:
        shards: the base's files.
        adapter: None where the base is only converted.
        dtype: what floating-point tensors become (safetensors' name); None leaves each as it is.
        projector: whether an adapter may bring a projector (``mm_projector``) that the base lacks.

    Raises:
        UsageError: the adapter holds something that the base has no place for, or of another shape.
    """
    planned = MergePlan()
    where = {name: shard for shard in shards for name in shard.names}
    names = TensorNames(where)
    edits: dict[str, list[Edit]] = {}
    whole: dict[str, WholeTensor] = {}
    unplaced: list[str] = []
    if adapter:
        _place(adapter, names, where, edits, unplaced)
        for key, one in adapter.whole.items():
            name = names.find(key)
            if name is not None:
                _same_shape(key, one, where[name].store.entries[name])
                whole[name] = one
            elif projector and ".mm_projector." in key:
                planned.besides["model.mm_projector." + key.rpartition(".mm_projector.")[2]] = one
            else:
                unplaced.append(key)
        _refuse_unplaced(unplaced, adapter)
        planned.loras = len(adapter.loras)
        planned.replaced = set(whole)
    for shard in shards:
        planned.files.append([_piece(shard, name, whole, edits, dtype) for name in shard.names])
    return planned


def _piece(
    shard: Shard,
    name: str,
    whole: Mapping[str, WholeTensor],
    edits: Mapping[str, list[Edit]],
    dtype: str | None,
) -> ShardPiece:
    stored = shard.store.entries[name]
    if dtype and stored.dtype in FLOATS:
        stored = StoredTensor(dtype, stored.shape)
    one = whole.get(name)
    store, key = (one.store, one.key) if one else (shard.store, name)
    return ShardPiece(name, stored, store, key, tuple(edits.get(name, ())))


def _place(
    adapter: Adapter,
    names: TensorNames,
    where: Mapping[str, Shard],
    edits: dict[str, list[Edit]],
    unplaced: list[str],
) -> None:
    """Turn each LoRA into an edit of the weight that it belongs to."""
    found: list[tuple[Lora, str, tuple[int, ...]]] = []
    for lora in adapter.loras:
        name = names.find(f"{lora.module}.weight")
        if name is None:
            unplaced.append(lora.a)
            continue
        found.append((lora, name, where[name].store.entries[name].shape))
    flipped = adapter.fan_in_fan_out and _are_flipped(adapter, found)
    for lora, name, shape in found:
        if name in edits:
            raise UsageError(
                f"the adapter has two LoRAs for {name[:100]}", hint="save the adapter again"
            )
        delta = _delta_shape(adapter, lora)
        if shape != (delta[::-1] if flipped else delta):
            raise UsageError(
                f"the adapter changes {name[:100]} by {_shown(delta)}, the base has"
                f" {_shown(shape)}",
                hint="name the base that the adapter was trained on"
                + (f": {adapter.base_name[:100]}" if adapter.base_name else ""),
            )
        edits[name] = [AddLora(adapter.store, lora, flipped and not lora.embedding)]
        if lora.bias:
            bias = names.find(f"{lora.module}.bias")
            if bias is None:
                unplaced.append(lora.bias)
            else:
                edits[bias] = [AddBias(adapter.store, lora)]


def _are_flipped(adapter: Adapter, found: Sequence[tuple[Lora, str, tuple[int, ...]]]) -> bool:
    """Whether the layers really keep (in, out), as GPT-2's do.

    peft turns ``fan_in_fan_out`` off for plain linear layers; a layer that is not square tells.
    """
    return any(
        shape != delta and shape == delta[::-1]
        for lora, _, shape in found
        if not lora.embedding
        for delta in (_delta_shape(adapter, lora),)
    )


def _delta_shape(adapter: Adapter, lora: Lora) -> tuple[int, ...]:
    """(out, in) of a linear layer, (rows, width) of an embedding."""
    a, b = adapter.store.entries[lora.a].shape, adapter.store.entries[lora.b].shape
    return (a[1], b[0]) if lora.embedding else (b[0], a[1])


def _same_shape(key: str, one: WholeTensor, stored: StoredTensor) -> None:
    shape = one.store.entries[one.key].shape
    if shape != stored.shape:
        raise UsageError(
            f"the adapter replaces {key[:100]} by {_shown(shape)}, the base has"
            f" {_shown(stored.shape)}",
            hint="where tokens were added, resize and save the base first",
        )


def _refuse_unplaced(unplaced: Sequence[str], adapter: Adapter) -> None:
    """Refuse an adapter of which a part has no place: nothing is dropped silently."""
    if not unplaced:
        return
    shown = ", ".join(key[:100] for key in unplaced[:3])
    more = f" and {len(unplaced) - 3} more" if len(unplaced) > 3 else ""
    named = f"; it was trained on {adapter.base_name[:100]}" if adapter.base_name else ""
    tied = any("lm_head" in key for key in unplaced)
    raise UsageError(
        f"the base has no tensor for {shown}{more} of the adapter",
        hint="the base ties lm_head to the embeddings: untie and save it first"
        if tied
        else f"name the base that the adapter was trained on{named}",
    )


def _shown(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "one number"
