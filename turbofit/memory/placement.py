"""Places the decoder layers of a model copy on a group of GPUs: one device for each layer.

It is for engines that split a model by its layers. The engine gives the sizes of layers, prompts
and tower; the placement of layers is the same for all such engines.
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
    """The worst request: ``tokens`` of prompt and answer, ``images``, and units of all images."""

    tokens: int
    images: int
    units: int


def load_of(vision_load: VisionLoad, tokens: int) -> Load:
    return Load(
        tokens=tokens, images=vision_load.images_per_request, units=vision_load.units_per_request
    )


class Placement(Struct):
    """The device (its place in the group) of each decoder layer; None: it is offloaded.

    Vision tower and embeddings are on device 0; the last norm is on the last device, and so is
    lm_head unless it is tied to the embeddings.
    """

    devices: int
    layers: tuple[int | None, ...]

    @property
    def offloaded(self) -> tuple[int, ...]:
        """The numbers of the layers that are on no device."""
        return tuple(n for n, place in enumerate(self.layers) if place is None)


class Layer(Struct):
    """One decoder layer: bytes of its weights, and of its KV cache for one token and one image.

    ``kv_per_image`` is for layers that attend to an image's features instead of tokens
    (Llama-3.2-Vision: 6404 positions an image, for every prompt).
    """

    weights: int
    kv_per_token: int
    kv_per_image: int = 0

    def kv(self, tokens: int, images: int) -> int:
        return self.kv_per_token * tokens + self.kv_per_image * images


class Components(Struct):
    """The weight bytes of each component, in the served dtype.

    ``vision`` is tower, projector and bare parameters; ``head`` is 0 if it is ``tied`` to the
    embeddings. ``experts``, of one layer, are also contained in `layers`.
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
    """The bytes of one copy of a model on a group of GPUs; a GPU's position is its place."""

    model: Model
    dtype: str
    gpus: tuple[Gpu, ...]
    parts: Components

    @abstractmethod
    def room(self, place: int) -> int:
        """Bytes of the card for weights, cache and activations."""

    @abstractmethod
    def writes_matrix(self, place: int) -> bool:
        """Whether attention on this card stores the matrix of all pairs."""

    @abstractmethod
    def resident_bytes(self, place: int, devices: int) -> int:
        """Bytes of the weights on this card outside the decoder layers."""

    @abstractmethod
    def vision(self, place: int, load: Load) -> int:
        """Bytes of the vision tower's forward; the request's cache is empty at that time."""

    @abstractmethod
    def activations(self, place: int, load: Load, *, block: int = 0) -> dict[str, int]:
        """Alternatives besides a full cache; ``block``: bytes of an offloaded layer's weights."""

    @abstractmethod
    def staging(self) -> int:
        """Bytes that loading needs in addition to the weights."""

    @abstractmethod
    def cached(self, layers: Sequence[Layer], load: Load) -> int:
        """Bytes of the cache of some layers."""

    @abstractmethod
    def device_map(self, placement: Placement, host: int | None) -> dict[str, int | str]:
        """The device map in the engine's names; ``host``: bytes for offloaded layers."""

    def block(self, offloaded: Sequence[int]) -> int:
        """Bytes of the largest offloaded layer, which passes through the first device."""
        return max((self.parts.layers[number].weights for number in offloaded), default=0)


class LayeredEngine(Engine):
    """The base of engines that split a model by its layers."""

    @abstractmethod
    def copy(
        self, model: Model, dtype: str, gpus: Sequence[Gpu], margins: Sequence[int]
    ) -> LayeredCopy:
        """Make one copy of a model on a group of GPUs."""

    @abstractmethod
    def tightest(self, copies: Sequence[LayeredCopy]) -> LayeredCopy:
        """One copy for several groups: all that it can hold, each group can hold, too."""

    @abstractmethod
    def placed(self, launch: EngineLaunch, placement: Placement) -> Account:
        """Make the account of one copy with placed layers."""


def best_placement(copy: LayeredCopy, load: Load) -> Placement:
    """The best placement: all layers on GPUs, else as many as fit, else none."""
    return place_all(copy, load) or fewest_offloaded(copy, load) or nowhere(copy)


def nowhere(copy: LayeredCopy) -> Placement:
    return Placement(devices=len(copy.gpus), layers=(None,) * len(copy.parts.layers))


def holds(copy: LayeredCopy, load: Load) -> bool:
    """Whether the copy's GPUs can hold the whole model for this request."""
    return _filled(copy, load, 0, 0) is not None


def place_all(copy: LayeredCopy, load: Load) -> Placement | None:
    """The placement that leaves the most memory on every device; None if it does not fit.

    Layers stay in order, since each cut costs one transfer for each token.
    """
    placement = _filled(copy, load, 0, 0)
    if placement is None or len(copy.gpus) == 1:
        return placement
    most = max(copy.room(place) for place in range(len(copy.gpus)))
    spare, _ = bisect(lambda room: _filled(copy, load, 0, room) is not None, 0, most, MIB)
    return _filled(copy, load, 0, spare)


def fewest_offloaded(copy: LayeredCopy, load: Load) -> Placement | None:
    """The placement with the fewest offloaded layers; None if offloading all is not enough."""
    count = len(copy.parts.layers)
    if _filled(copy, load, count, 0) is None:
        return None
    few = bisect_left(range(count), True, key=lambda n: _filled(copy, load, n, 0) is not None)
    return _filled(copy, load, few, 0)


def _filled(copy: LayeredCopy, load: Load, offloaded: int, spare: int) -> Placement | None:
    """Fill the devices with layers in order, leaving ``spare`` bytes on each; None if too many.

    Offloaded layers come after those of the first device, which runs them; on a single device they
    are in the middle.
    """
    devices, count = len(copy.gpus), len(copy.parts.layers)
    resident: list[int | None] = []
    # The cache of each layer; that of offloaded layers is on the first device.
    caches = [copy.cached([layer], load) for layer in copy.parts.layers]
    guests = sum(caches[:offloaded])
    for place in range(devices):
        block = copy.block(range(count)) if place == 0 and offloaded else 0
        text = max(copy.activations(place, load, block=block).values())
        # Temporary memory of loading, and the tower, use the memory of the cache before it exists.
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
