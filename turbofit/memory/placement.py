"""Decoder layers of one copy of a model, placed on a group of GPUs: which device holds each.

For engines that split a model by its layers. What a layer, a prompt and a tower take is the
engine's to say; where layers go is the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence

from turbofit.core.machine import Gpu
from turbofit.core.model import Model
from turbofit.core.struct import Struct
from turbofit.core.units import MIB, bisect
from turbofit.memory.account import Account, Engine, EngineLaunch, VisionLoad


class Load(Struct):
    """The worst request: ``tokens`` of prompt and answer, ``images``, and their ``units``."""

    tokens: int
    images: int
    units: int


def load_of(vision_load: VisionLoad, tokens: int) -> Load:
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


class Layer(Struct):
    """One decoder layer: bytes of its weights, and of its KV cache for one token and one image.

    ``kv_per_image``: of layers that attend to an image's features in place of tokens (of
    Llama-3.2-Vision: 6404 positions an image, whatever the prompt).
    """

    weights: int
    kv_per_token: int
    kv_per_image: int = 0

    def kv(self, tokens: int, images: int) -> int:
        return self.kv_per_token * tokens + self.kv_per_image * images


class Components(Struct):
    """Weight bytes by component, in the dtype that is served.

    ``vision`` is tower, projector and bare parameters; ``head`` is 0 where it is ``tied`` to the
    embeddings. ``experts``, of one layer, are part of `layers` too.
    """

    vision: int
    embeddings: int
    layers: tuple[Layer, ...]
    norm: int
    head: int
    tied: bool
    experts: int = 0

    @property
    def weights(self) -> int:
        layers = sum(layer.weights for layer in self.layers)
        return self.vision + self.embeddings + layers + self.norm + self.head


class LayeredCopy(ABC):
    """Bytes of one copy of a model on a group of GPUs, each GPU a place."""

    model: Model
    dtype: str
    gpus: tuple[Gpu, ...]
    parts: Components

    @abstractmethod
    def room(self, place: int) -> int:
        """Bytes of a card for weights, cache and activations."""

    @abstractmethod
    def writes_matrix(self, place: int) -> bool:
        """Whether attention writes the matrix of all pairs there."""

    @abstractmethod
    def resident_bytes(self, place: int, devices: int) -> int:
        """Weights of what is no decoder layer."""

    @abstractmethod
    def vision(self, place: int, load: Load) -> int:
        """Bytes of the vision tower's forward: the request's cache is empty then."""

    @abstractmethod
    def activations(self, place: int, load: Load, *, block: int = 0) -> dict[str, int]:
        """The alternatives beside a full cache; ``block``: an offloaded layer's weights."""

    @abstractmethod
    def staging(self) -> int:
        """Bytes that loading holds beyond the weights."""

    @abstractmethod
    def cached(self, layers: Sequence[Layer], load: Load) -> int:
        """The cache of some layers."""

    @abstractmethod
    def device_map(self, placement: Placement, host: int | None) -> dict[str, int | str]:
        """The map in the engine's own names; ``host`` bytes hold offloaded layers."""

    def block(self, offloaded: Sequence[int]) -> int:
        """The weights that the largest offloaded layer brings to the first device."""
        return max((self.parts.layers[number].weights for number in offloaded), default=0)


class LayeredEngine(Engine):
    """An engine that splits a model by its layers."""

    @abstractmethod
    def copy(
        self, model: Model, dtype: str, gpus: Sequence[Gpu], margins: Sequence[int]
    ) -> LayeredCopy:
        """One copy of a model on a group of GPUs."""

    @abstractmethod
    def tightest(self, copies: Sequence[LayeredCopy]) -> LayeredCopy:
        """A copy that stands for copies on several groups: what it holds, each of them holds."""

    @abstractmethod
    def placed(self, launch: EngineLaunch, placement: Placement) -> Account:
        """Every byte of one copy whose layers are placed."""


def best_placement(copy: LayeredCopy, load: Load) -> Placement:
    """All layers on GPUs where they fit, else as many as fit; on none where nothing helps."""
    return place_all(copy, load) or fewest_offloaded(copy, load) or nowhere(copy)


def nowhere(copy: LayeredCopy) -> Placement:
    return Placement(devices=len(copy.gpus), layers=(None,) * len(copy.parts.layers))


def holds(copy: LayeredCopy, load: Load) -> bool:
    """Whether the copy's devices hold the whole model for this request."""
    return _filled(copy, load, 0, 0) is not None


def place_all(copy: LayeredCopy, load: Load) -> Placement | None:
    """The placement that leaves the most on every device; None where they do not hold it.

    Layers stay in order: each cut costs one transfer a token.
    """
    placement = _filled(copy, load, 0, 0)
    if placement is None or len(copy.gpus) == 1:
        return placement
    most = max(copy.room(place) for place in range(len(copy.gpus)))
    spare, _ = bisect(lambda room: _filled(copy, load, 0, room) is not None, 0, most, MIB)
    return _filled(copy, load, 0, spare)


def fewest_offloaded(copy: LayeredCopy, load: Load) -> Placement | None:
    """The placement with the fewest layers on no device; None where not even all of them help."""
    count = len(copy.parts.layers)
    if _filled(copy, load, count, 0) is None:
        return None
    few = bisect_left(range(count), True, key=lambda n: _filled(copy, load, n, 0) is not None)
    return _filled(copy, load, few, 0)


def _filled(copy: LayeredCopy, load: Load, offloaded: int, spare: int) -> Placement | None:
    """Layers poured into the devices in order, ``spare`` bytes left on each; None: too many.

    Offloaded layers follow those of the first device, which runs them; on a single device they are
    in the middle.
    """
    devices, count = len(copy.gpus), len(copy.parts.layers)
    resident: list[int | None] = []
    # The cache of each layer, of offloaded ones on the first device.
    caches = [copy.cached([layer], load) for layer in copy.parts.layers]
    guests = sum(caches[:offloaded])
    for place in range(devices):
        block = copy.block(range(count)) if place == 0 and offloaded else 0
        text = max(copy.activations(place, load, block=block).values())
        # What loading holds for a while, and the tower, have the cache's room to themselves.
        early = max(copy.vision(place, load), copy.staging())
        room = copy.room(place) - copy.resident_bytes(place, devices) - spare
        weights, cache = 0, guests if place == 0 else 0
        if max(early, cache + text) > room:
            return None
        while len(resident) < count - offloaded:
            number = len(resident)
            weights += copy.parts.layers[number].weights
            cache += caches[number]
            if weights + max(early, cache + text) > room:
                break
            resident.append(place)
    if len(resident) < count - offloaded:
        return None
    first = sum(1 for place in resident if place == 0)
    at = (first + 1) // 2 if devices == 1 else first
    without: list[int | None] = [None] * offloaded
    return Placement(devices=devices, layers=(*resident[:at], *without, *resident[at:]))
