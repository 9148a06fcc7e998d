"""Places the decoder layers of a model on groups of GPUs, for an engine that splits by layers.

A placement has an entry for each decoder layer: the place of a device in the group, or None if the
layer is offloaded. Vision tower and embeddings are on device 0. The last norm and lm_head are on
the last device; an lm_head that is tied to the embeddings is on device 0.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from msgspec.structs import replace

from turbofit.core.machine import Gpu
from turbofit.core.model import DTYPE_BYTES, Model
from turbofit.core.struct import known
from turbofit.core.units import MIB, bisect
from turbofit.machine.presets import context_bytes
from turbofit.memory.account import AMPERE, HOPPER, Load, Placement, capability_of
from turbofit.memory.transformers.activations import (
    components,
    layout_of,
    prefill_bytes,
    vision_bytes,
)

#: Bytes of a vocabulary entry: logits, their 32-bit copy, sorted values and indices, sums.
_SAMPLING: Final = 64
#: Bytes of putting image features into a prompt, in units of the prompt's embeddings. Alive are the
#: embeddings, a copy with the features, the features, the mask, and a 64-bit sum over the mask,
#: which finds each feature's place.
_SCATTER: Final = 12
#: The workspaces that torch allocates for cuBLAS and cuBLASLt; True: on Hopper or newer cards.
_WORKSPACE: Final = {False: 2 * 9 * MIB, True: 2 * 32 * MIB}
#: Rounding of torch's allocator, in segments of weights; measured 8 to 57 MiB.
_ROUNDING: Final = 64 * MIB
#: Memory reserved beyond allocations at the peak, with expandable segments: measured 1 to 8 %.
_FRAGMENTS_PERCENT: Final = 10
#: Tensors that the loader holds at the same time while it casts.
_LOADERS: Final = 4
#: Additional memory for joining experts, as a multiple of one layer's experts.
_JOINED: Final = 2


def workspace(gpu: Gpu) -> int:
    """Return the bytes of cuBLAS's workspaces on a card."""
    return _WORKSPACE[capability_of(gpu) >= HOPPER]


class ModelCopies:
    """A model's copies, one on each group of GPUs, with one placement for all; sizes in bytes.

    A place is a position in the groups, such as the second GPU of each group. The tightest GPU at a
    place decides on the room for weights, cache and activations. A place counts the matrix of all
    pairs of tokens if attention on one of the place's GPUs stores that matrix. ``margins`` are the
    bytes to leave free on each GPU, by the GPU's index.

    Raises:
        UsageError: Transformers does not serve the model.
    """

    def __init__(
        self,
        model: Model,
        dtype: str,
        groups: Sequence[Sequence[Gpu]],
        margins: Mapping[int, int],
    ) -> None:
        self.model, self.dtype, self.groups = model, dtype, groups
        self.layout, self.parts = layout_of(model), components(model, dtype)
        self.devices, self._width = len(groups[0]), DTYPE_BYTES[dtype]
        #: Bytes of rounding, and of holes from joining experts: measured 0.3 of a layer's experts.
        self.rounding = _ROUNDING + self.parts.experts // 2
        places = list(zip(*groups, strict=True))
        #: Bytes of each place for weights, cache and activations.
        self.rooms = [min(self._room(gpu, margins[gpu.index]) for gpu in gpus) for gpus in places]
        #: Whether attention at each place stores the matrix of all pairs. Torch's memory-efficient
        #: kernel does not accept grouped heads, and the flash kernel needs Ampere. Over: a card of
        #: unknown capability counts as older.
        grouped = model.text.heads != model.text.kv_heads
        self.writes_matrix = [
            grouped and any(capability_of(gpu, unknown=(0, 0)) < AMPERE for gpu in gpus)
            for gpus in places
        ]

    def _room(self, gpu: Gpu, margin: int) -> int:
        fixed = context_bytes(gpu)[0] + workspace(gpu) + self.rounding
        return gpu.usable - known(gpu.used, 0) - margin - fixed

    def vision(self, place: int, load: Load) -> int:
        """Return the bytes of the tower's forward on the GPU at index ``place`` of each group.

        Only the first GPU of a group runs the tower.
        """
        if place:
            return 0
        return _rounded(vision_bytes(self.model, self.layout, load.units, self._width))

    def activations(self, place: int, load: Load, *, block: int = 0) -> dict[str, int]:
        """Return the most bytes that each stage of a request needs at a place, without the cache.

        Stages do not overlap; only the largest stage counts. ``block``: bytes of an offloaded
        layer's weights.
        """
        model, width, matrix = self.model, self._width, self.writes_matrix[place]
        here = load if place == 0 else replace(load, units=0)
        alternatives = {
            "prefill": prefill_bytes(model, here, width, writes_matrix=matrix) + block,
            "sampling": _SAMPLING * model.text.vocab + block,
        }
        if place == 0 and load.images and model.image_rule is not None:
            alternatives["image_features"] = _SCATTER * load.tokens * model.text.hidden * width
        return {name: _rounded(size) for name, size in alternatives.items() if size}

    def staging(self) -> int:
        """Return the bytes that loading needs in addition to the weights, for casts and experts.

        Transformers joins the experts of a layer into one tensor. In rehearsals, torch held 1.0 to
        1.5 times the experts' bytes in addition.
        """
        joined, text = _JOINED * self.parts.experts, self.model.text
        if self.dtype == self.model.dtype:
            return joined
        largest = max(text.vocab, text.intermediate) * text.hidden * DTYPE_BYTES[self.model.dtype]
        return joined + largest * _LOADERS

    def cached(self, layers: Iterable[int], load: Load) -> int:
        """Return the bytes of the cache of some layers; ``layers`` are the layers' numbers."""
        kv = (self.parts.layers[number].kv(load.tokens, load.images) for number in layers)
        return _rounded(sum(kv))

    def block(self, offloaded: Iterable[int]) -> int:
        """Return the bytes of the largest offloaded layer, which passes through device 0."""
        return max((self.parts.layers[number].weights for number in offloaded), default=0)

    def device_map(self, placement: Placement, host: int | None) -> dict[str, int | str]:
        """Return the device map with Transformers' module names.

        ``host`` is the host memory in bytes for offloaded layers; None: unknown. Offloaded layers
        beyond the host memory are read from disk for every token.
        """
        text, taken, last = self.layout.text, 0, self.devices - 1
        first = (*self.layout.first, f"{text}.embed_tokens", f"{text}.rotary_emb")
        mapping: dict[str, int | str] = dict.fromkeys(first, 0)
        for number, place in enumerate(placement):
            taken += self.parts.layers[number].weights if place is None else 0
            away = "cpu" if host is None or taken <= host else "disk"
            mapping[f"{text}.layers.{number}"] = away if place is None else place
        return {**mapping, f"{text}.norm": last, "lm_head": 0 if self.parts.tied else last}


def _rounded(size: int) -> int:
    return -(-size * (100 + _FRAGMENTS_PERCENT) // 100)


def offloaded(placement: Placement) -> list[int]:
    """Return the numbers of the layers that are on no device."""
    return [number for number, place in enumerate(placement) if place is None]


def place_all(copies: ModelCopies, load: Load) -> Placement | None:
    """Return the placement that leaves the most memory on every device; None if none fits.

    Layers stay in order, since each change of device costs one transfer for each token.
    """
    placement = filled(copies, load)
    if placement is None or copies.devices == 1:
        return placement

    def leaves(spare: int) -> bool:
        return filled(copies, load, spare=spare) is not None

    return filled(copies, load, spare=bisect(leaves, 0, max(copies.rooms), MIB)[0])


def fewest_offloaded(copies: ModelCopies, load: Load) -> Placement | None:
    """Return the placement with the fewest offloaded layers; None if the rest does not fit."""
    count = len(copies.parts.layers)

    def fits(off: int) -> bool:
        return filled(copies, load, off) is not None

    return filled(copies, load, bisect_left(range(count), True, key=fits))


def filled(copies: ModelCopies, load: Load, off: int = 0, spare: int = 0) -> Placement | None:
    """Return the placement that fills one device after the other; None if the layers do not fit.

    ``off`` is the number of offloaded layers, which device 0 runs. The offloaded layers come after
    device 0's own layers; on a single device, they come in the middle of the own layers. ``spare``
    bytes are left on each device.
    """
    parts = copies.parts
    count, last = len(parts.layers), copies.devices - 1
    resident: list[int | None] = []
    caches = [copies.cached([number], load) for number in range(count)]
    for place, card in enumerate(copies.rooms):
        block = copies.block(range(count)) if place == 0 and off else 0
        text = max(copies.activations(place, load, block=block).values())
        # The tower, and the temporary memory of loading, need their bytes before the cache exists.
        early = max(copies.vision(place, load), copies.staging())
        weights = parts.vision + parts.embeddings if place == 0 else 0
        weights += parts.norm + parts.head if place == last else 0
        # The cache of offloaded layers is on the first device.
        cache = sum(caches[:off]) if place == 0 else 0
        if weights + max(early, cache + text) > card - spare:
            return None
        while len(resident) < count - off:
            weights += parts.layers[len(resident)].weights
            cache += caches[len(resident)]
            if weights + max(early, cache + text) > card - spare:
                break
            resident.append(place)
    if len(resident) < count - off:
        return None
    first = resident.count(0)
    at = (first + 1) // 2 if copies.devices == 1 else first
    return (*resident[:at], *[None] * off, *resident[at:])
