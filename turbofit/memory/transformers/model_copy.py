"""Bytes of one copy of a model on a group of GPUs, wherever its decoder layers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from turbofit.core.machine import Gpu
from turbofit.core.model import DTYPE_BYTES, Model
from turbofit.core.struct import NA, Struct, known
from turbofit.core.units import MIB
from turbofit.machine.presets import context_bytes
from turbofit.memory.shared_terms import AMPERE, HOPPER
from turbofit.memory.transformers.activations import (
    embedding_bytes,
    prefill_bytes,
    sampling_bytes,
    vision_bytes,
)
from turbofit.memory.transformers.components import Layer, components
from turbofit.memory.transformers.layout import layout_of
from turbofit.memory.vision_load import VisionLoad

__all__ = ["Load", "ModelCopy", "Placement", "load_of"]

#: cuBLAS's workspace as torch asks for it, once for the library and once for cuBLASLt.
_WORKSPACE: Final = {False: 2 * 9 * MIB, True: 2 * 32 * MIB}
#: Torch's allocator rounds: segments of weights, seen 8 to 57 MiB.
_ROUNDING: Final = 64 * MIB
#: Reserved beyond what is allocated at the peak, with expandable segments: seen 1 to 8 %.
_FRAGMENTS_PERCENT: Final = 10
#: Tensors that the loader holds at once while it casts.
_LOADERS: Final = 4
#: Times the bytes of one layer's experts.
_JOINED: Final = 2


class Load(Struct):
    """The one request that is served at a time, at its worst.

    ``tokens`` of prompt and answer, ``images``, and their vision ``units`` together.
    """

    tokens: int
    images: int
    units: int


def load_of(vision_load: VisionLoad, tokens: int) -> Load:
    """The worst request of so many tokens."""
    return Load(
        tokens=tokens, images=vision_load.images_per_request, units=vision_load.units_per_request
    )


class Placement(Struct):
    """Which device (by its place in the group) holds each decoder layer; None: none does.

    Vision tower and embeddings are on device 0; the last norm is on the last device, and so is
    lm_head unless it is tied to the embeddings.
    """

    devices: int
    layers: tuple[int | None, ...]

    @property
    def offloaded(self) -> tuple[int, ...]:
        """The layers that no device holds."""
        return tuple(n for n, place in enumerate(self.layers) if place is None)


class ModelCopy:
    """Bytes of one copy of a model on a group of GPUs.

    Args:
        model: what is served.
        dtype: that it is served in.
        gpus: the group, in the order of the device map.
        margins: bytes to leave on each.

    Raises:
        UsageError: Transformers does not serve the model.
    """

    def __init__(
        self, model: Model, dtype: str, gpus: Sequence[Gpu], margins: Sequence[int]
    ) -> None:
        self.model, self.dtype = model, dtype
        self.gpus, self.margins = tuple(gpus), tuple(margins)
        self.layout = layout_of(model)
        self.parts = components(model, dtype)
        self._width = DTYPE_BYTES[dtype]
        #: Bytes of each CUDA context, and where the figure is from.
        self.contexts = [context_bytes(gpu) for gpu in gpus]

    def writes_matrix(self, place: int) -> bool:
        """Whether attention writes the matrix of all pairs there.

        Torch's memory-efficient kernel takes no grouped heads, and the flash one needs Ampere. A
        card whose capability cannot be read counts as older. Over where it is not.
        """
        capability = self.gpus[place].compute_capability
        grouped = self.model.text.heads != self.model.text.kv_heads
        return grouped and (capability == NA or capability < AMPERE)

    def room(self, place: int) -> int:
        """Bytes of a card for weights, cache and activations: without others, context, margin."""
        gpu = self.gpus[place]
        usable = gpu.usable - known(gpu.used, 0)
        fixed = self.contexts[place][0] + self.workspace(place) + self.rounding
        return usable - self.margins[place] - fixed

    def cache_bytes(self, number: int, load: Load) -> int:
        """The cache of a layer, on the device that holds it; of an offloaded one on the first."""
        return self.cached([self.parts.layers[number]], load)

    def resident_bytes(self, place: int, devices: int) -> int:
        """Weights of what is no decoder layer."""
        parts, held = self.parts, 0
        if place == 0:
            held += parts.vision + parts.embeddings + (parts.head if parts.tied else 0)
        if place == devices - 1:
            held += parts.norm + (0 if parts.tied else parts.head)
        return held

    def vision(self, place: int, load: Load) -> int:
        """Bytes of the vision tower's forward on a device: the request's cache is empty then."""
        if place:
            return 0
        return self._rounded(vision_bytes(self.model, self.layout, load.units, self._width))

    def activations(self, place: int, load: Load, *, block: int = 0) -> dict[str, int]:
        """The alternatives beside a full cache; ``block``: an offloaded layer's weights."""
        model, width = self.model, self._width
        units = load.units if place == 0 else 0
        matrix = self.writes_matrix(place)
        prefill = prefill_bytes(model, load.tokens, load.images, units, width, writes_matrix=matrix)
        found = {"prefill": prefill + block, "sampling": sampling_bytes(model) + block}
        if place == 0:
            found["image_features"] = embedding_bytes(model, load.tokens, load.images, width)
        return {name: self._rounded(size) for name, size in found.items() if size}

    def block(self, offloaded: Sequence[int]) -> int:
        """The weights that the largest offloaded layer brings to the first device."""
        return max((self.parts.layers[number].weights for number in offloaded), default=0)

    def staging(self) -> int:
        """Bytes that loading holds beyond the weights, where it casts them or joins experts.

        Transformers joins the experts of a layer into one tensor: torch was seen to hold 1.0 to 1.5
        times their bytes more.
        """
        joined = _JOINED * self.parts.experts
        if self.dtype == self.model.dtype:
            return joined
        stored = DTYPE_BYTES[self.model.dtype]
        text = self.model.text
        largest = max(text.vocab, text.intermediate) * text.hidden * stored
        return joined + largest * _LOADERS

    def cached(self, layers: Sequence[Layer], load: Load) -> int:
        """The cache of some layers for a request."""
        return self._rounded(sum(layer.kv(load.tokens, load.images) for layer in layers))

    @property
    def rounding(self) -> int:
        """With experts, the holes of loading too: seen 0.3 times a layer's experts."""
        return _ROUNDING + self.parts.experts // 2

    def workspace(self, place: int) -> int:
        """Bytes of cuBLAS on a card."""
        capability = self.gpus[place].compute_capability
        return _WORKSPACE[capability == NA or capability >= HOPPER]

    @staticmethod
    def _rounded(size: int) -> int:
        return -(-size * (100 + _FRAGMENTS_PERCENT) // 100)
