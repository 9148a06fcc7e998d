"""The interface of engines and accounts for planning, and the code that all accounts share.

An engine starts in this order. Other processes hold ``used`` bytes. The engine makes contexts and
communicators, and loads the weights. Then the engine reads the free memory of the fullest GPU in
the group, and a ratio of the free memory becomes the cache. Later allocations must fit into the
rest. An account has the size of each step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, NamedTuple, TypeAlias

from msgspec import UNSET
from msgspec.structs import replace

from turbofit.core.images import ImageRule
from turbofit.core.machine import Calibration, Gpu, Machine
from turbofit.core.memory_stack import BEFORE_CACHE
from turbofit.core.model import Model
from turbofit.core.plan import (
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    Backend,
    Basis,
    EngineName,
    EnginePlan,
    GpuLedger,
    HostMemory,
    Settings,
    Term,
    TermPhase,
)
from turbofit.core.promise import Limits, Promise
from turbofit.core.struct import Struct, known
from turbofit.core.units import round_up
from turbofit.core.version import REFERENCE
from turbofit.machine.presets import context_bytes
from turbofit.memory.versions import release
from turbofit.memory.worst_images import Maker, Meeting, Text, over_edges, side_by_side

#: For each decoder layer, the position of its device in the group; None: no device has the layer.
Placement: TypeAlias = tuple[int | None, ...]
#: The compute capabilities of two architectures; cards older than Ampere have no bfloat16.
AMPERE, HOPPER = (8, 0), (9, 0)
#: The driver's page in bytes; an allocation outside a pool takes whole pages.
PAGE: Final = 2 << 20
#: The term of memory that stays allocated, in the engine's pool or in torch, after the warm-up.
POOL_WARMUP: Final = "pool_warmup"
#: The term of states of linear attention, one for each request of a batch.
STATE_CACHE: Final = "state_cache"
#: The number of steps from 0 to 1 for a plan's ratio.
RATIO_STEPS = 1000

#: The only term of loading that is free again before the first request.
TEMPORARIES: Final = "load_temporaries"
#: LMDeploy's batch sizes by a part of the GPU's name:
#: lmdeploy lmdeploy/utils.py::get_max_batch_size #1cc12e
_BATCH_SIZES: Final = {
    "a100": 384, "a800": 384, "h100": 1024, "h800": 1024, "l20y": 1024, "h200": 1024,
    "default": 128,
}  # fmt: skip
_PREFILL: Final = 8192  # lmdeploy cli/utils.py::ArgumentHelper.max_prefill_token_num `default=8192`
_RATIO: Final = 0.8  # lmdeploy cli/utils.py::ArgumentHelper.cache_max_entry_count `default=0.8`


class CacheShape(Struct):
    """The layout of one rank's cache with given settings; sizes in bytes.

    All blocks have one size and ``block_tokens`` tokens; the engine keeps ``reserved`` blocks for
    itself. The driver allocates whole multiples of ``step``. If the cache is divided into pages,
    the first page begins at the next multiple of ``page``.
    """

    block_bytes: int
    block_tokens: int
    step: int
    page: int = 1
    reserved: int = 0

    def held(self, region: int) -> int:
        """Return the bytes that the driver allocates for a region of ``region`` bytes."""
        return round_up(region, self.step)

    def tokens(self, region: int) -> int:
        """Return how many KV tokens requests have at least in a cache of ``region`` bytes."""
        return max(0, region // self.block_bytes - self.reserved) * self.block_tokens


class LoggedSlab(NamedTuple):
    """What a line of an engine's log says about the cache: bytes of a slab, and of an object in it.

    The first line is about KV blocks. Other lines are about states: ``each`` is then the number of
    objects for one sequence.
    """

    slab_bytes: int
    object_bytes: int
    each: int = 1


class Load(Struct):
    """The worst request: ``tokens`` of prompt and answer, ``images``, and units of all images."""

    tokens: int
    images: int
    units: int


class VisionLoad(Struct):
    """The images of the worst request: vision units (tiles or patches), images and image tokens.

    ``units_per_forward`` is the most units that the peak must allow for in one forward; None means
    the engine's own bound. ``text_tokens`` and ``output_tokens`` are the text and the answer beside
    the images that a plan supposes; no byte of an account depends on these two.
    """

    units_per_image: int
    images_per_request: int
    tokens_per_request: int
    units_per_forward: int | None = None
    text_tokens: int = PROMPT_TOKENS
    output_tokens: int = OUTPUT_TOKENS

    @property
    def units_per_request(self) -> int:
        return self.units_per_image * self.images_per_request

    @property
    def text_alone(self) -> VisionLoad:
        """The same request without its images."""
        none = replace(self, units_per_image=0, images_per_request=0, tokens_per_request=0)
        return replace(none, units_per_forward=None)

    @property
    def usual(self) -> VisionLoad:
        """The same images beside a text and an answer of the lengths that plans suppose."""
        return replace(self, text_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS)

    def of(self, tokens: int) -> Load:
        """Return the worst request with ``tokens`` tokens of prompt and answer."""
        return Load(tokens=tokens, images=self.images_per_request, units=self.units_per_request)

    def budgeted_units(self, bound: int) -> int:
        """Return the vision units of one forward for which the peak has room.

        ``bound`` is the most that the engine can have; a lower `units_per_forward` replaces it.
        """
        return bound if self.units_per_forward is None else min(bound, self.units_per_forward)


def vision_load_within(limits: Limits) -> VisionLoad:
    """Return the vision load of the worst request that a plan's limits admit.

    The load leaves ``units_per_forward`` open (None): several worst requests may bring more units
    into one forward than the plan's peak allows for.
    """
    return VisionLoad(
        units_per_image=limits.units_per_image,
        images_per_request=limits.images_per_request,
        tokens_per_request=limits.image_tokens_per_request,
    )


NO_IMAGES = VisionLoad(units_per_image=0, images_per_request=0, tokens_per_request=0)


class EngineLaunch(Struct):
    """One engine on one group of GPUs, before the launch.

    ``machine`` has the links between ``gpus``; ``vision_load`` is the load of the vision tower that
    clients can cause. ``margins`` are the bytes to leave free on each GPU. ``saved`` are the most
    bytes by which a calibration lowers each margin; ``withheld`` are the bytes by which a budget
    raises each margin. ``free_at_cache`` are the free bytes that a log reports when the cache is
    sized; they replace all terms before the cache. ``placement`` is for an engine that splits a
    model by layers; an empty placement lets the engine take the best one.
    """

    model: Model
    settings: Settings
    gpus: tuple[Gpu, ...]
    machine: Machine
    vision_load: VisionLoad
    margins: tuple[int, ...] = ()
    saved: tuple[int, ...] = ()
    withheld: tuple[int, ...] = ()
    free_at_cache: int | None = None
    placement: Placement = ()

    def nccl_link(self, gpu: Gpu) -> str:
        """Return the class of link for which NCCL's buffers were measured."""
        if not self.machine.nvlinked(self.gpus):
            return "host"
        return "nvlink_hopper" if capability_of(gpu) >= HOPPER else "nvlink"

    def margins_with(self, calibration: Calibration | None) -> tuple[int, ...]:
        """Return the bytes to leave free on each GPU, in the launch's order.

        A calibration of this launch lowers the margins, since it measured the libraries' memory.
        """
        if calibration is None or not self.saved:
            return self.margins
        pairs = zip(self.margins, self.saved, strict=True)
        return tuple(margin - max(0, saved - calibration.spread) for margin, saved in pairs)


class Forward(Struct):
    """The content of one forward pass.

    ``tokens`` run through the decoder; ``context`` is the summed length of the sequences in
    prefill. ``rows`` are sequences that sample a token; ``top_k_0``: at least one row samples over
    the whole vocabulary. ``units`` are tiles or patches of all images in the pass, each image
    encoded whole. ``first_layer``: a warm-up that runs only the first layer.
    """

    tokens: int
    context: int = 0
    rows: int = 1
    units: int = 0
    top_k_0: bool = False
    first_layer: bool = False


def term(name: str, phase: TermPhase, size: int, basis: Basis, note: str = "") -> Term:
    """Return one named line of a ledger, in bytes."""
    return Term(term=name, phase=phase, bytes=size, basis=basis, note=note)


def first_terms(gpu: Gpu) -> list[Term]:
    """Return the memory on one GPU before an engine's own: of other processes, and a context."""
    context, note = context_bytes(gpu)
    return [
        term("others", "before", known(gpu.used, 0), "measured", "held by others"),
        term("cuda_context", "context", context, "estimate", note),
    ]


def transients(cases: Sequence[tuple[str, int, Basis, str]], step: int = 1) -> tuple[Term, ...]:
    """Make alternative terms that share the same memory, from cases: name, bytes, basis, note.

    Sizes are rounded up to multiples of ``step``. The largest term before rounding is marked as the
    worst, since rounding may make two equal.
    """
    sizes = [size for _, size, _, _ in cases]
    worst = sizes.index(max(sizes))
    return tuple(
        Term(
            term=name,
            phase="transient",
            bytes=round_up(size, step),
            basis=basis,
            note=note,
            worst=i == worst,
        )
        for i, (name, size, basis, note) in enumerate(cases)
    )


def batch_size(sizes: Mapping[str, int], gpu_name: str) -> int:
    """Return the default ``max_batch_size`` on a GPU of this name.

    ``sizes`` has the default by a part of the GPU's name, and under ``default`` that of other GPUs.
    """
    named = (size for part, size in sizes.items() if part in gpu_name.lower())
    return next(named, sizes["default"])


def capability_of(gpu: Gpu, unknown: tuple[int, int] = HOPPER) -> tuple[int, int]:
    """Return the compute capability; if unknown, Hopper's, which takes the most memory."""
    return unknown if gpu.compute_capability == "NA" else gpu.compute_capability


def uneven(dealt: Iterable[tuple[int, str]], tp: int) -> Iterator[str]:
    """Yield a message for each number that is not a multiple of ``tp``.

    ``dealt`` has the numbers, and a name for each number.
    """
    for number, what in dealt:
        if number % tp:
            yield f"{what} do not divide by {tp}"


class StaticMemory(Struct):
    """The memory on one GPU that does not depend on the ratio.

    ``before`` is in use when the engine reads the free memory. ``temporaries`` are the bytes of
    ``before`` that are freed before the first request. ``staged`` are the most additional bytes
    while weights are loaded. ``buffers`` are allocated after the cache. ``transients`` are
    alternatives on this GPU only.
    """

    before: tuple[Term, ...]
    buffers: tuple[Term, ...]
    temporaries: int = 0
    staged: int = 0
    transients: tuple[Term, ...] = ()


class LateMemory(NamedTuple):
    """The memory on one GPU after the cache: buffers, the pool, and alternatives to the pool."""

    buffers: tuple[Term, ...]
    pool: tuple[Term, ...]
    transients: tuple[Term, ...]


class Account(ABC):
    """The memory of one model with given settings on one group of GPUs.

    Args:
        launch: the engine on its group; :meth:`ledgers_at` gets the ratio later.
        static: the memory on each GPU that does not depend on the ratio.
        pool: what the engine's allocator keeps after its warm-up; the transients reuse this memory.
          None if it keeps nothing.
        transients: the alternatives on every GPU; the largest counts.
        units_per_forward: the vision units in the largest transient.
        calibration: measured corrections for this launch, already applied to ``static``.
    """

    #: Words about a cache that is too small, and about the engine's end; ``{more}``: missing bytes.
    cache_shortfall: str
    #: The engine's behaviour without memory for a request, in words.
    dies: ClassVar[str]
    #: The allocator that serves a request's memory.
    allocator: ClassVar[str]
    #: Whether the engine encodes images only after the cache has blocks for the whole prompt.
    admits_prompts: ClassVar[bool] = True
    #: Terms that only requests allocate; these never prevent a start.
    grown: tuple[str, ...] = ()
    #: The time at which ``pool_warmup`` is allocated.
    warmup_words: ClassVar[str] = "in LMDeploy's own warm-up"

    #: The layout of one rank's cache.
    shape: CacheShape
    #: The fewest KV blocks that let the engine start with these settings.
    least_blocks: int

    def __init__(
        self,
        launch: EngineLaunch,
        static: Sequence[StaticMemory],
        pool: Term | None,
        transients: Sequence[Term],
        units_per_forward: int,
        calibration: Calibration | None = None,
    ) -> None:
        self.launch, self.calibration = launch, calibration
        self.settings, self.gpus = launch.settings, launch.gpus
        self.margins = launch.margins_with(calibration)
        self.units_per_forward = units_per_forward
        self.transients = tuple(transients)
        if launch.free_at_cache is not None:
            static = _as_logged(launch.gpus, static, launch.free_at_cache)
        self._static_memory = tuple(static)
        self._pool = () if pool is None else (pool,)
        self._usable = [gpu.usable for gpu in self.gpus]
        before = [total_bytes(memory.before) for memory in static]
        #: The most bytes in use on each GPU while loading.
        self._load_peaks = [
            size - memory.temporaries + max(memory.staged, memory.temporaries)
            for size, memory in zip(before, static, strict=True)
        ]
        #: The bytes that the tightest GPU lacks for its margin while loading; negative if every GPU
        #: has more than enough.
        self._missing_while_loading = max(
            peak + margin - usable
            for peak, margin, usable in zip(
                self._load_peaks, self.margins, self._usable, strict=True
            )
        )
        largest = _largest((*self._pool, *transients))
        #: Bytes that are left for the cache on each GPU, beside the margin and all other memory: of
        #: the pool and the transients, only the largest counts.
        self._rooms = [
            usable - margin - (size - memory.temporaries + total_bytes(memory.buffers))
            - max(largest, _largest(memory.transients))
            for usable, margin, size, memory in zip(
                self._usable, self.margins, before, static, strict=True
            )
        ]  # fmt: skip
        #: Free bytes that the engine reads to size the cache; negative if memory is exceeded.
        self.free = min(usable - size for usable, size in zip(self._usable, before, strict=True))

    @property
    def ratio(self) -> float:
        """The ratio of the settings; LMDeploy calls it ``cache_max_entry_count``."""
        return self.settings.cache_max_entry_count

    @property
    def ratio_base(self) -> int:
        """The bytes that ratio 1 would give to the cache; negative if the memory is exceeded."""
        return self.free

    @abstractmethod
    def region_at(self, ratio: float) -> int:
        """Return the bytes of the cache on each rank."""

    def tokens_at(self, ratio: float) -> int:
        """Return the KV tokens that the cache holds at least."""
        return self.shape.tokens(self.region_at(ratio))

    @abstractmethod
    def cache_terms(self, i: int, ratio: float) -> list[Term]:
        """Return the cache of GPU ``i`` as terms of its ledger."""

    @property
    def block_bytes(self) -> int:
        """The bytes of one KV block on one rank."""
        return self.shape.block_bytes

    @property
    def block_tokens(self) -> int:
        """The tokens in one KV block."""
        return self.shape.block_tokens

    @property
    def bytes_per_token(self) -> int:
        """The bytes of one token's keys and values on one rank."""
        return self.block_bytes // self.block_tokens

    def blocks_at(self, ratio: float) -> int:
        """Return the KV blocks that the engine compares with ``least_blocks``."""
        return self.tokens_at(ratio) // self.block_tokens

    def cache_shortfall_at(self, ratio: float) -> int:
        """Return the bytes that the cache lacks for a start; 0 if the engine starts."""
        return max(0, self.least_blocks - self.blocks_at(ratio)) * self.block_bytes

    def best_ratio(self) -> float | None:
        """Return the largest multiple of 0.001 that keeps all margins; None if no cache fits."""
        if self.ratio_base <= 0 or self._missing_while_loading > 0:
            return None
        # No more steps than these can fit; whether they do, only the whole account shows.
        steps = min(RATIO_STEPS - 1, max(0, min(self._rooms)) * RATIO_STEPS // self.ratio_base + 1)
        while steps > 0 and not self.fits_at(steps / RATIO_STEPS):
            steps -= 1
        return steps / RATIO_STEPS if steps else None

    def fits_at(self, ratio: float) -> bool:
        """Return whether every GPU keeps its margin with this ratio."""
        return self.missing_at(ratio) == 0

    def missing_at(self, ratio: float) -> int:
        """Return the bytes that the tightest GPU lacks for its margin with this ratio, or 0."""
        serving = max(self._cache_bytes(i, ratio) - room for i, room in enumerate(self._rooms))
        return max(0, serving, self._missing_while_loading)

    def missing_without_ratio(self) -> int:
        """Return the bytes that the tightest GPU lacks for its margin and the least cache.

        This is for a plan where no ratio fits. More memory never makes the figure larger.
        """
        least = self.least_blocks * self.block_bytes
        rooms = (room - self._cache_bytes(i, 0.0) for i, room in enumerate(self._rooms))
        return max(1, self.missing_at(0.0), least - min(rooms))

    def taken_at(self, ratio: float) -> tuple[int, ...]:
        """Return the most bytes that the engine takes on each GPU, either loading or serving."""
        taken = []
        for i, gpu in enumerate(self.gpus):
            beside_cache = self._usable[i] - self.margins[i] - self._rooms[i]
            peak = beside_cache + self._cache_bytes(i, ratio)
            taken.append(max(peak, self._load_peaks[i]) - known(gpu.used, 0))
        return tuple(taken)

    def ledgers_at(self, ratio: float) -> tuple[GpuLedger, ...]:
        """Return the ledger of each GPU with one ratio."""
        return tuple(self._ledger(i, ratio) for i in range(len(self.gpus)))

    def _cache_bytes(self, i: int, ratio: float) -> int:
        """Return the bytes that the driver allocates for the cache on GPU ``i``.

        The terms of the cache subtract the temporaries of loading, which are freed before the first
        request. The sum adds these bytes back, since `_rooms` already counts them as free.
        """
        return total_bytes(self.cache_terms(i, ratio)) + self._static_memory[i].temporaries

    def _late(self, i: int, ratio: float) -> LateMemory:  # noqa: ARG002 - of older engines
        """Return the memory on GPU ``i`` that the engine takes after the cache."""
        memory = self._static_memory[i]
        return LateMemory(memory.buffers, self._pool, (*self.transients, *memory.transients))

    def _ledger(self, i: int, ratio: float) -> GpuLedger:
        """Return the ledger of GPU ``i``: terms in the order of allocation, and sums of terms."""
        gpu, late = self.gpus[i], self._late(i, ratio)
        before = self._static_memory[i].before
        body = [*before, *self.cache_terms(i, ratio), *late.buffers, *late.pool]
        steady, load_peak = total_bytes(body), self._load_peaks[i]
        peak = steady - total_bytes(late.pool) + _largest((*late.pool, *late.transients))
        withheld = self.launch.withheld[i] if self.launch.withheld else 0
        return GpuLedger(
            index=gpu.index,
            uuid=gpu.uuid,
            name=gpu.name,
            total=known(gpu.total, 0),
            reserved=known(gpu.reserved, 0),
            used=known(gpu.used, 0),
            free=known(gpu.free, 0),
            terms=(*body, *late.transients),
            steady=steady,
            load_peak=load_peak,
            peak=peak,
            headroom=self._usable[i] - max(peak, load_peak),
            margin=self.margins[i],
            withheld=withheld or UNSET,
        )


def _as_logged(
    gpus: Sequence[Gpu], static: Sequence[StaticMemory], free: int
) -> list[StaticMemory]:
    """Return each GPU's memory with one term in place of all terms before the cache.

    ``free`` are the free bytes that a log reports when the cache is sized.
    """
    note = "all that is not free when the cache is sized"
    before = [term(BEFORE_CACHE, "before", gpu.usable - free, "measured", note) for gpu in gpus]
    return [
        replace(memory, before=(line,), temporaries=0, staged=0)
        for memory, line in zip(static, before, strict=True)
    ]


def total_bytes(terms: Sequence[Term]) -> int:
    """Return the sum of the terms' bytes."""
    return sum([term.bytes for term in terms])  # a search sums terms by the million


def _largest(terms: Sequence[Term]) -> int:
    return max([term.bytes for term in terms], default=0)


class RankWeights(Struct):
    """Bytes of one rank's weights: in all, read in a decode step, and in the vision tower."""

    total: int
    decode: int
    vision: int


class Engine(ABC):
    """An engine of LMDeploy in one version, such as ``0.18``, or Transformers."""

    name: ClassVar[EngineName]
    #: Whether an image that chunked prefill cuts is encoded again for every chunk.
    encodes_again: ClassVar[bool] = False
    #: KV blocks that a request takes beyond those of the longest text; an upper bound. An engine
    #: allocates ahead of the answer's end: 1 token in TurboMind (``inflight_new_tokens``), 16
    #: in the PyTorch engine (lmdeploy lmdeploy/messages.py `prefill_interval: int = 16`). TurboMind
    #: also keeps a cached block while it copies the block.
    blocks_ahead: ClassVar[int] = 2
    #: Whether the engine measures kernels in a warm-up, and can load an earlier choice of kernels.
    tunes_kernels: ClassVar[bool] = False
    #: Why the account may be wrong for the wished version; None if that version has an account.
    doubt: str | None = None
    #: The source line that allocates page-locked host memory, as the engine's log names it.
    pinned_call: str = ""
    #: The class of the engine's accounts; an account takes a launch and ``constants``.
    account_class: ClassVar[Any]
    constants: Any

    def __init__(self, version: str) -> None:
        self.version = version

    @property
    def backend(self) -> Backend:
        """The engine as a plan names it."""
        return Backend(name=self.name, version=self.version)

    @property
    def tells_first_tokens(self) -> bool:
        """Whether this engine, started by turbofit, tells the first token of each answer.

        `serving.engine.first_tokens` knows the functions of one release.
        """
        return release(self.version) == release(REFERENCE)

    def check_options(self, engine_options: Mapping[str, object]) -> None:  # noqa: B027 - most have all
        """Refuse options that only other engines have.

        Raises:
            UsageError: the options have one of another engine.
        """

    def defaults(self, gpu_name: str) -> dict[str, object]:
        """Return the default settings of LMDeploy, on a GPU of this name."""
        return {
            "cache_max_entry_count": _RATIO,
            "max_batch_size": batch_size(_BATCH_SIZES, gpu_name),
            "max_prefill_token_num": _PREFILL,
        }

    def account(self, launch: EngineLaunch) -> Account:
        """Make the account of one engine on its group."""
        account: Account = self.account_class(launch, self.constants)
        return account

    def tp_problem(self, model: Model, tp: int) -> str | None:  # noqa: ARG002
        """Return the reason why the engine refuses this tensor-parallel degree, or None."""
        return None

    def problem(self, launch: EngineLaunch) -> str | None:  # noqa: ARG002
        """Return why the engine refuses the launch's options, or dies of an option; or None."""
        return None

    def missing_kernels(self, launch: EngineLaunch) -> str | None:  # noqa: ARG002
        """Return a sentence about code that the engine lacks for the launch's cards, or None."""
        return None

    def units_bound(self, rule: ImageRule, vision_load: VisionLoad, settings: Settings) -> int:
        """Return the most vision units in one forward; an upper bound."""
        return int(self.account_class.units_bound(rule, vision_load, settings))

    def worst_images(
        self,
        promise: Promise,
        engine: EnginePlan,
        make: Maker,
        text: Text,
        *,
        several: bool = False,
    ) -> Meeting:
        """Return images of one prompt that bring the units of the plan's peak into one forward.

        The images' units may be slightly fewer. ``several``: return several smaller images even if
        a single image is enough; the units may then be one percent fewer.
        """
        forward = self.forward_tokens(engine.settings)
        units, most = engine.units_per_forward, promise.limits.units_per_image
        room = promise.context - text.after
        single = make(units, room - text.before - text.around)
        if not self.encodes_again:  # an image is never cut, and may be longer than a forward
            largest = make(most, room)
            longest = 0 if largest is None else largest.tokens + text.around
            tokens = min(room - text.before, max(forward - text.before, longest))
            return side_by_side(lambda u, t: make(min(u, most), t), units, tokens, text)
        # One image is enough if the plan or a request's fields let an image have so many units.
        if single is not None and not several and (units <= most or single.units > most):
            return Meeting(single.units, [single])
        return over_edges(make, units, room, forward, text, share=0.99 if several else 1.0)

    def forward_tokens(self, settings: Settings) -> int:
        """Return the most tokens in one forward."""
        return settings.max_prefill_token_num

    def prompt_tokens(self, settings: Settings) -> int:
        """Return the least prompt tokens that a forward reads while a whole batch decodes."""
        return self.forward_tokens(settings)

    def cache(self, model: Model, settings: Settings) -> CacheShape:
        """Return the layout of one rank's cache."""
        shape: CacheShape = self.account_class.cache_shape(model.text, settings, self.constants)
        return shape

    def logged_cache(
        self,
        slabs: Sequence[LoggedSlab],  # noqa: ARG002 - most have no such lines
        settings: Settings,  # noqa: ARG002
    ) -> CacheShape | None:
        """Return the layout of the cache by the engine's log; None if the log does not show it."""
        return None

    @abstractmethod
    def weights(self, model: Model, tp: int) -> RankWeights:
        """Return the permanent weights of one rank, without formats that only some cards have."""

    def environment(
        self,
        model: Model,  # noqa: ARG002
        settings: Settings,  # noqa: ARG002
        ledgers: Sequence[GpuLedger] = (),  # noqa: ARG002
    ) -> dict[str, str]:
        """Return the engine's environment variables.

        Some engines limit their memory to the bytes that the plan's ``ledgers`` count.
        """
        return {}

    @abstractmethod
    def host_memory(
        self, model: Model, settings: Settings, *, units_per_forward: int
    ) -> HostMemory:
        """Return the host memory that one replica takes; ``available`` stays unknown."""

    def warnings(self, settings: Settings) -> tuple[str, ...]:  # noqa: ARG002 - an engine's own
        """Return warnings for people about this engine with these settings."""
        return ()

    def communicator(self, settings: Settings) -> str:
        """Return the library or method by which the GPUs of a group communicate."""
        return settings.communicator
