"""The account of Transformers: the memory of one model copy, with layers placed on a group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Final

from turbofit.core.errors import UsageError, option_of
from turbofit.core.images import ImageRule
from turbofit.core.machine import Gpu
from turbofit.core.model import Model
from turbofit.core.plan import EngineName, GpuLedger, HostMemory, Settings, Term
from turbofit.core.units import GIB, format_bytes
from turbofit.memory.account import (
    Account,
    CacheShape,
    Engine,
    EngineLaunch,
    RankWeights,
    StaticMemory,
    VisionLoad,
    first_terms,
    term,
    transients,
)
from turbofit.memory.placement import (
    ModelCopies,
    fewest_offloaded,
    offloaded,
    place_all,
    workspace,
)
from turbofit.memory.transformers.activations import components

_NOTES = {
    "prefill": "a whole prompt in one layer",
    "sampling": "one token",
    "image_features": "features put among the embeddings",
}

#: The release of Transformers with which the account was compared. Other releases of 5 are accepted
#: if their private classes are equal.
_RELEASE: Final = "5.17"
#: Host bytes of one server: torch, CUDA's libraries, Transformers. The estimate is high: 1 GB was
#: measured on a CPU, without CUDA's libraries.
_HOST_PROCESS: Final = 4 * GIB
#: Options of LMDeploy that Transformers also has.
_OPTIONS: Final = frozenset({"dtype", "session_len", "max_batch_size", "tp"})


class TransformersAccount(Account):
    """The memory of one copy of a model that answers one request of ``session_len`` tokens.

    Methods ignore ``ratio``, since Transformers' cache grows with the request.
    """

    cache_shortfall: str = "of the longest request ({more} more)"
    dies: ClassVar[str] = "answers with an error"
    allocator: ClassVar[str] = "torch's allocator"
    least_blocks = 0

    def __init__(self, launch: EngineLaunch) -> None:
        margins = {gpu.index: size for gpu, size in zip(launch.gpus, launch.margins, strict=True)}
        self.copies = ModelCopies(launch.model, launch.settings.dtype, [launch.gpus], margins)
        size = sum(layer.kv_per_token for layer in self.copies.parts.layers)
        # The cache grows token by token.
        self.shape = CacheShape(block_bytes=size, block_tokens=1, step=1)
        self._load = launch.vision_load.of(launch.settings.session_len)
        copies, load = self.copies, self._load
        placement = launch.placement or place_all(copies, load) or fewest_offloaded(copies, load)
        # Without any placement that fits, all layers are offloaded.
        placement = placement or (None,) * len(copies.parts.layers)
        self._off = offloaded(placement)
        #: The numbers of the layers on each GPU.
        self._on = [
            [number for number, at in enumerate(placement) if at == place]
            for place in range(len(launch.gpus))
        ]
        static = [
            StaticMemory(
                before=tuple(self._before(place, gpu)),
                buffers=(term("workspace", "buffers", workspace(gpu), "estimate", "cuBLAS"),),
                # Loading may also use cuBLAS.
                staged=workspace(gpu) + self.copies.staging(),
                transients=self._transients(place),
            )
            for place, gpu in enumerate(launch.gpus)
        ]
        super().__init__(launch, static, None, (), self._load.units)

    def region_at(self, ratio: float) -> int:  # noqa: ARG002 - it grows with the request
        """Return the bytes of the longest request's cache, on all GPUs together."""
        load = self._load
        return sum(layer.kv(load.tokens, load.images) for layer in self.copies.parts.layers)

    def tokens_at(self, ratio: float) -> int:  # noqa: ARG002
        return self._load.tokens

    def cache_terms(self, i: int, ratio: float) -> list[Term]:  # noqa: ARG002
        note = (
            f"one request of {self._load.tokens:,} tokens: the cache grows with the request, and"
            " torch keeps the memory; fragments included"
        )
        return [term("kv_cache", "cache", self._cached(i), "formula", note)]

    def _cached(self, place: int) -> int:
        guests = self._off if place == 0 else []
        return self.copies.cached([*self._on[place], *guests], self._load)

    def _before(self, place: int, gpu: Gpu) -> Iterator[Term]:
        """Yield the terms of others, context and weights on one GPU."""
        copies, parts, mine = self.copies, self.copies.parts, self._on[place]
        first, last = place == 0, place == copies.devices - 1
        yield from first_terms(gpu)
        sound = ", and an audio tower" if copies.model.vision and copies.model.vision.audio else ""
        tied = "lm_head is the same tensor" if parts.tied else ""
        layers = sum(parts.layers[number].weights for number in mine)
        weights = [
            ("vision_tower", parts.vision * first, f"with its projector{sound}"),
            ("embeddings", parts.embeddings * first, tied),
            ("decoder_layers", layers, f"{len(mine)} of them"),
            ("norm_and_head", (parts.norm + parts.head) * last, ""),
        ]
        basis = copies.model.source.sizes
        yield from (term(name, "weights", size, basis, why) for name, size, why in weights if size)
        why = "torch takes memory in steps of up to 20 MiB"
        why += "; holes that joined experts leave" if parts.experts else ""
        yield term("allocator_rounding", "weights", copies.rounding, "estimate", why)

    def _transients(self, place: int) -> tuple[Term, ...]:
        """Return the memory of each stage of a request on one GPU, as alternatives."""
        copies, load = self.copies, self._load
        block = copies.block(self._off) if place == 0 else 0
        cases = []
        if vision := copies.vision(place, load):
            note = (
                f"all images of a request in the tower take {format_bytes(vision)}, fragments"
                " included; the cache is empty at that time"
            )
            cases.append(("vision", max(0, vision - self._cached(place)), note))
        for name, size in copies.activations(place, load, block=block).items():
            note = f"{_NOTES[name]}, fragments included"
            if block and name in ("prefill", "sampling"):
                note += "; an offloaded layer's weights pass through"
            cases.append((name, size, note))
        return transients([(name, size, "estimate", note) for name, size, note in cases])


class Transformers(Engine):
    """The engine for models that LMDeploy cannot run, with one request at a time."""

    name: ClassVar[EngineName] = "transformers"

    def __init__(self) -> None:
        super().__init__(_RELEASE)

    def defaults(self, gpu_name: str) -> dict[str, object]:  # noqa: ARG002 - alike on all cards
        return {"max_batch_size": 1}

    def check_options(self, engine_options: Mapping[str, object]) -> None:
        for name in sorted(set(engine_options) - _OPTIONS):
            raise UsageError(
                f"`{option_of(name)}` is an option of LMDeploy, not of the fallback engine",
                hint="leave it out; `--dtype` and `--session-len` are used",
            )
        if engine_options.get("max_batch_size", 1) != 1:
            raise UsageError(
                "the fallback engine serves one request at a time: `--max-batch-size` is 1",
                hint="`--replicas N` serves N at a time, each on GPUs of its own",
            )

    def account(self, launch: EngineLaunch) -> Account:
        return TransformersAccount(launch)

    def units_bound(self, rule: ImageRule, vision_load: VisionLoad, settings: Settings) -> int:  # noqa: ARG002
        return vision_load.units_per_request

    def cache(self, model: Model, settings: Settings) -> CacheShape:
        """Return the cache's layout: a block is one token, with its bytes on all GPUs together."""
        size = sum(layer.kv_per_token for layer in components(model, settings.dtype).layers)
        return CacheShape(block_bytes=size, block_tokens=1, step=1)

    def environment(
        self,
        model: Model,  # noqa: ARG002
        settings: Settings,  # noqa: ARG002
        ledgers: Sequence[GpuLedger] = (),  # noqa: ARG002
    ) -> dict[str, str]:
        """Return the variable that lets torch grow its segments in place.

        Without the variable, the loader leaves holes, and the cache too, which grows token by
        token.
        """
        return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}

    def weights(self, model: Model, tp: int) -> RankWeights:  # noqa: ARG002 - layers take turns
        parts = components(model, model.dtype)
        decode = parts.weights - parts.vision - (0 if parts.tied else parts.embeddings)
        return RankWeights(total=parts.weights, decode=decode, vision=parts.vision)

    def host_memory(
        self,
        model: Model,  # noqa: ARG002
        settings: Settings,  # noqa: ARG002
        *,
        units_per_forward: int,  # noqa: ARG002
    ) -> HostMemory:
        """Return the host memory of one copy with all layers on GPUs."""
        return HostMemory(pinned=0, pageable=_HOST_PROCESS, available=None)

    def communicator(self, settings: Settings) -> str:  # noqa: ARG002
        return "none"
