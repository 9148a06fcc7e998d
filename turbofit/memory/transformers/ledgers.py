"""The ledger of each GPU of one copy of a model, for a placement of its components."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from turbofit.core.machine import Gpu
from turbofit.core.model import DTYPE_BYTES, Model
from turbofit.core.plan import GpuLedger, Term
from turbofit.core.struct import NA, Struct, known
from turbofit.core.units import GIB, MIB, format_bytes
from turbofit.machine.presets import context_bytes
from turbofit.memory.transformers.activations import (
    embedding_bytes,
    prefill_bytes,
    sampling_bytes,
    vision_bytes,
)
from turbofit.memory.transformers.components import Layer, components
from turbofit.memory.transformers.layout import layout_of

__all__ = ["HOST_PROCESS", "Load", "Placement", "TransformersAccount"]

#: Host bytes of one server: torch, its CUDA libraries, Transformers. An estimate, over: 1 GB was
#: seen on a CPU (without CUDA's libraries).
HOST_PROCESS: Final = 4 * GIB

_AMPERE: Final = (8, 0)
_HOPPER: Final = (9, 0)
#: cuBLAS's workspace as torch asks for it, once for the library and once for cuBLASLt.
_WORKSPACE: Final = {False: 2 * 9 * MIB, True: 2 * 32 * MIB}
#: Torch's allocator rounds: segments of weights, seen 8 to 57 MiB.
_ROUNDING: Final = 64 * MIB
#: Reserved beyond what is allocated at the peak, with expandable segments: seen 1 to 8 %.
_FRAGMENTS_PERCENT: Final = 10
#: Tensors that the loader has in its hands at once while it casts.
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


class TransformersAccount:
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
        self._contexts = [context_bytes(gpu) for gpu in gpus]

    def writes_matrix(self, place: int) -> bool:
        """Whether attention writes the matrix of all pairs there.

        Torch's memory-efficient kernel takes no grouped heads, and the flash one needs Ampere. A
        card whose capability cannot be read counts as older. Over where it is not.
        """
        capability = self.gpus[place].compute_capability
        grouped = self.model.text.heads != self.model.text.kv_heads
        return grouped and (capability == NA or capability < _AMPERE)

    def room(self, place: int) -> int:
        """Bytes of a card for weights, cache and activations: without others, context, margin."""
        gpu = self.gpus[place]
        usable = known(gpu.total, 0) - known(gpu.reserved, 0) - known(gpu.used, 0)
        fixed = self._contexts[place][0] + self._workspace(place) + self._rounding
        return usable - self.margins[place] - fixed

    def cache_bytes(self, number: int, load: Load) -> int:
        """The cache of a layer, on the device that holds it; of an offloaded one on the first."""
        return self._cached([self.parts.layers[number]], load)

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

    def ledger(self, place: int, placement: Placement, load: Load) -> GpuLedger:
        """The ledger of one GPU."""
        gpu, margin = self.gpus[place], self.margins[place]
        terms = self._terms(place, placement, load)
        worst = max((t for t in terms if t.phase == "transient"), key=lambda t: t.bytes)
        steady = sum(t.bytes for t in terms if t.phase != "transient")
        loaded = sum(t.bytes for t in terms if t.phase not in ("transient", "cache"))
        total, reserved = known(gpu.total, 0), known(gpu.reserved, 0)
        peak, load_peak = steady + worst.bytes, loaded + self.staging()
        return GpuLedger(
            index=gpu.index,
            uuid=gpu.uuid,
            name=gpu.name,
            total=total,
            reserved=reserved,
            used=known(gpu.used, 0),
            free=known(gpu.free, 0),
            ledger=tuple(
                Term(
                    term=t.term, phase=t.phase, bytes=t.bytes, basis=t.basis, note=t.note,
                    worst=t is worst,
                )
                for t in terms
            ),
            steady=steady,
            load_peak=load_peak,
            peak=peak,
            headroom=total - reserved - max(peak, load_peak),
            margin=margin,
        )  # fmt: skip

    def _terms(self, place: int, placement: Placement, load: Load) -> list[Term]:
        gpu, parts, last = self.gpus[place], self.parts, placement.devices - 1
        mine = [parts.layers[n] for n, at in enumerate(placement.layers) if at == place]
        guests = [parts.layers[n] for n in placement.offloaded] if place == 0 else []
        context, note = self._contexts[place]
        head = 0 if parts.tied else parts.head
        basis = self.model.source.sizes
        terms = [
            Term(term="others", phase="before", bytes=known(gpu.used, 0), basis="measured"),
            Term(term="cuda_context", phase="context", bytes=context, basis="estimate", note=note),
        ]
        weights = [
            ("vision_tower", parts.vision if place == 0 else 0, "with its projector"),
            ("embeddings", parts.embeddings if place == 0 else 0,
             "lm_head is the same tensor" if parts.tied else ""),
            ("decoder_layers", sum(one.weights for one in mine), f"{len(mine)} of them"),
            ("norm_and_head", parts.norm + head if place == last else 0, ""),
        ]  # fmt: skip
        terms += [
            Term(term=name, phase="weights", bytes=size, basis=basis, note=why)
            for name, size, why in weights
            if size
        ]
        return [
            *terms,
            Term(
                term="allocator_rounding", phase="weights", bytes=self._rounding,
                basis="estimate", note="torch takes memory in steps of up to 20 MiB"
                + ("; holes that joining experts leaves" if parts.experts else ""),
            ),
            Term(
                term="kv_cache", phase="cache", bytes=self._cached([*mine, *guests], load),
                basis="formula", note=f"one request of {load.tokens:,} tokens; grown as it comes, "
                "then kept by torch; fragments included",
            ),
            Term(
                term="workspace", phase="buffers", bytes=self._workspace(place), basis="estimate",
                note="cuBLAS",
            ),
            *self._alternatives(place, placement, load, self._cached([*mine, *guests], load)),
        ]  # fmt: skip

    def _alternatives(self, place: int, placement: Placement, load: Load, cache: int) -> list[Term]:
        notes = {
            "prefill": "a whole prompt in one layer",
            "sampling": "one token",
            "image_features": "features put among the embeddings",
        }
        block = self.block(placement.offloaded) if place == 0 else 0
        terms: list[Term] = []
        vision = self.vision(place, load)
        if vision:
            terms.append(
                Term(
                    term="vision", phase="transient", bytes=max(0, vision - cache),
                    basis="estimate", note="all images of a request in the tower take "
                    f"{format_bytes(vision)}, fragments included; the cache's room is empty then",
                )
            )  # fmt: skip
        for name, size in self.activations(place, load, block=block).items():
            note = notes[name] + ", fragments included"
            if block and name in ("prefill", "sampling"):
                note += "; an offloaded layer's weights pass through"
            terms.append(
                Term(term=name, phase="transient", bytes=size, basis="estimate", note=note)
            )
        return terms

    def _cached(self, layers: Sequence[Layer], load: Load) -> int:
        return self._rounded(sum(layer.kv(load.tokens, load.images) for layer in layers))

    @property
    def _rounding(self) -> int:
        """With experts, the holes of loading too: seen 0.3 times a layer's experts."""
        return _ROUNDING + self.parts.experts // 2

    def _workspace(self, place: int) -> int:
        capability = self.gpus[place].compute_capability
        return _WORKSPACE[capability == NA or capability >= _HOPPER]

    @staticmethod
    def _rounded(size: int) -> int:
        return -(-size * (100 + _FRAGMENTS_PERCENT) // 100)
