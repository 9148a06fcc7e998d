"""What planning asks of every engine, and what the accounts of all engines have in common.

Others hold ``used``; then come contexts and communicators, then the weights. Then free memory is
read, the smallest of the group counts, and a ratio of it becomes the cache. What is allocated later
must live in what the ratio left. An engine's account says how much each of these is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final, NamedTuple

from msgspec import UNSET

from turbofit.core.images import ImageRule
from turbofit.core.machine import Calibration, Gpu, Machine
from turbofit.core.model import Model
from turbofit.core.plan import (
    Basis,
    EngineName,
    GpuLedger,
    HostMemory,
    Limits,
    Phase,
    PlannedEngine,
    Settings,
    Term,
)
from turbofit.core.struct import Struct, known
from turbofit.core.units import round_up
from turbofit.memory.kv_cache import CacheShape, LoggedSlab


class VisionLoad(Struct):
    """Units (tiles or patches) that the peak must pay for, and a request's image tokens.

    ``units_per_forward`` is None for the engine's own bound.
    """

    units_per_image: int
    images_per_request: int
    tokens_per_request: int
    units_per_forward: int | None = None

    @property
    def units_per_request(self) -> int:
        return self.units_per_image * self.images_per_request

    def budgeted_units(self, bound: int) -> int:
        """Units of a forward that the peak pays for: the engine's bound, or the plan's if less."""
        return bound if self.units_per_forward is None else min(bound, self.units_per_forward)


def vision_load_within(limits: Limits) -> VisionLoad:
    """What clients can ask of a plan's engines, whatever its peak pays for."""
    return VisionLoad(
        units_per_image=limits.units_per_image,
        images_per_request=limits.images_per_request,
        tokens_per_request=limits.image_tokens_per_request,
    )


NO_IMAGES = VisionLoad(units_per_image=0, images_per_request=0, tokens_per_request=0)


class EngineLaunch(Struct):
    """One engine on one group of GPUs, before it is launched.

    ``machine`` tells of the links between ``gpus``, and ``vision_load`` what clients can ask of the
    vision tower. ``margins`` are bytes to leave free on each GPU, and ``saved`` what of each a
    calibration makes superfluous; ``withheld`` is what of each a budget withholds.
    ``free_at_cache`` are the bytes that were free when the cache was sized, as a log said: they
    replace all that is taken before it.
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

    def margins_with(self, calibration: Calibration | None) -> tuple[int, ...]:
        """Bytes to leave free where contexts and libraries were measured, or were not."""
        if calibration is None or not self.saved:
            return self.margins
        pairs = zip(self.margins, self.saved, strict=True)
        return tuple(margin - max(0, saved - calibration.spread) for margin, saved in pairs)


class Forward(Struct):
    """What meets in one forward pass.

    ``tokens`` run through the decoder; ``context`` is the summed length of the sequences that are
    being prefilled; ``rows`` are sequences that sample a token, one of them over the whole
    vocabulary with ``top_k_0``; ``units`` are tiles or patches of all images that overlap the pass,
    each encoded whole. ``first_layer``: a warm-up, which runs that alone.
    """

    tokens: int
    context: int = 0
    rows: int = 1
    units: int = 0
    top_k_0: bool = False
    first_layer: bool = False


#: Their compute capabilities; cards before Ampere have no bfloat16.
AMPERE, HOPPER = (8, 0), (9, 0)
#: An allocation outside a pool takes whole pages of the driver, of this many bytes.
PAGE: Final = 2 << 20
#: The term of what the warm-up's forward leaves in the engine's pool or in torch's allocator.
POOL_WARMUP: Final = "pool_warmup"


def term(name: str, phase: Phase, size: int, basis: Basis, note: str = "") -> Term:
    """One named line of a ledger, in bytes."""
    return Term(term=name, phase=phase, bytes=size, basis=basis, note=note)


def transients(cases: Sequence[tuple[str, int, Basis, str]], step: int = 1) -> tuple[Term, ...]:
    """Alternatives that share one room, each a name, bytes, basis and note.

    The largest decides, before sizes are rounded up to whole steps, which can make two equal.
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


def capability_of(gpu: Gpu, unknown: tuple[int, int] = HOPPER) -> tuple[int, int]:
    """Compute capability; where it cannot be read Hopper's, which takes most. Over."""
    return unknown if gpu.compute_capability == "NA" else gpu.compute_capability


#: A plan's ratio is a multiple of one thousandth.
RATIO_STEPS = 1000

#: The one term of loading that is gone before the first request.
TEMPORARIES: Final = "load_temporaries"


class GroupOutcome(Struct):
    """A group at one ratio: what the engine sees as free, its cache, and each GPU's ledger."""

    ratio: float
    free: int
    region: int
    tokens: int
    ledgers: tuple[GpuLedger, ...]


class StaticMemory(Struct):
    """What one GPU holds whatever the ratio is.

    ``before`` is there when free memory is read; its ``temporaries`` are gone before the first
    request, and ``staged`` is the most that loading holds above the rest of it. ``buffers`` come
    after the cache. ``transients`` are the alternatives that this GPU alone has.
    """

    before: tuple[Term, ...]
    buffers: tuple[Term, ...]
    temporaries: int = 0
    staged: int = 0
    transients: tuple[Term, ...] = ()


class LateMemory(NamedTuple):
    """What one GPU holds after the cache: buffers, the pool, and what takes the pool's place."""

    buffers: tuple[Term, ...]
    pool: tuple[Term, ...]
    transients: tuple[Term, ...]


class Account(ABC):
    """One model under one set of settings on one group of GPUs.

    Args:
        launch: the engine on its group; the ratio comes later, in :meth:`at`.
        static: what each GPU holds whatever the ratio is.
        pool: what the engine's allocator keeps after its warm-up, in the transients' room; None
            where it keeps nothing.
        transients: the alternatives on every GPU; the largest decides.
        units_per_forward: vision units that the largest of them pays for.
        calibration: what was measured of such a launch; its corrections are in ``static`` already.
    """

    #: For whom a cache is too small, and what the engine then does; ``{more}`` is what is missing.
    cache_shortfall: str
    #: What the engine does where a request finds no memory.
    dies: ClassVar[str]
    #: From what a request's memory comes.
    allocator: ClassVar[str]
    #: Whether images are encoded only once the cache has blocks for their whole prompts.
    admits_prompts: ClassVar[bool] = True
    #: Terms of the buffers that come with the worst requests only, and end no start.
    grown: ClassVar[tuple[str, ...]] = ()
    #: When ``pool_warmup`` is taken.
    warmup_words: ClassVar[str] = "in LMDeploy's own warm-up"

    #: Bytes of one KV block on one rank, and its tokens.
    block_bytes: int
    block_tokens: int
    #: The fewest KV blocks with which the engine starts under the given settings.
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
        self._static_memory = tuple(static)
        self._pool = () if pool is None else (pool,)
        self._usable = [gpu.usable for gpu in self.gpus]
        before = [total_bytes(memory.before) for memory in static]
        #: The most that each GPU holds while loading.
        self._load_peaks = [
            size - memory.temporaries + max(memory.staged, memory.temporaries)
            for size, memory in zip(before, static, strict=True)
        ]
        #: Bytes that the cache may take on each GPU, beside its largest transient or the pool.
        self._rooms = [
            usable - margin - (size - memory.temporaries + total_bytes(memory.buffers))
            - _largest((*self._pool, *transients, *memory.transients))
            for usable, margin, size, memory in zip(
                self._usable, self.margins, before, static, strict=True
            )
        ]  # fmt: skip
        #: Free bytes that the engine sees when it sizes the cache; negative where nothing is left.
        self.free = min(usable - size for usable, size in zip(self._usable, before, strict=True))

    @property
    def ratio(self) -> float:
        """The ratio of its settings, which LMDeploy calls ``cache_max_entry_count``."""
        return self.settings.cache_max_entry_count

    @property
    def ratio_base(self) -> int:
        """Bytes of which the ratio takes its share; negative where nothing is left."""
        return self.free

    @abstractmethod
    def region_at(self, ratio: float) -> int:
        """Bytes of the cache on each rank."""

    @abstractmethod
    def tokens_at(self, ratio: float) -> int:
        """KV tokens that the cache holds, at least."""

    @abstractmethod
    def cache_terms(self, i: int, ratio: float) -> list[Term]:
        """The cache of one GPU as lines of its ledger."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values on one rank."""
        return self.block_bytes // self.block_tokens

    def forward_bytes(self, forward: Forward) -> int | None:  # noqa: ARG002
        """What one forward takes of the allocator; None: the account knows the worst ones alone."""
        return None

    def blocks_at(self, ratio: float) -> int:
        """KV blocks that the engine counts against ``least_blocks``."""
        return self.tokens_at(ratio) // self.block_tokens

    def cache_shortfall_at(self, ratio: float) -> int:
        """Bytes of cache that the engine lacks to start under these settings; 0 where it starts."""
        return max(0, self.least_blocks - self.blocks_at(ratio)) * self.block_bytes

    def best_ratio(self) -> float | None:
        """The largest multiple of 0.001 that leaves every margin; None where no cache fits."""
        if self.ratio_base <= 0 or self._missing_while_loading() > 0:
            return None
        steps = min(RATIO_STEPS - 1, max(0, min(self._rooms)) * RATIO_STEPS // self.ratio_base + 1)
        while steps > 0 and not self.fits_at(steps / RATIO_STEPS):
            steps -= 1
        return steps / RATIO_STEPS if steps else None

    def fits_at(self, ratio: float) -> bool:
        """Whether every GPU keeps its margin at this ratio."""
        return self.missing_at(ratio) == 0

    def missing_at(self, ratio: float) -> int:
        """Bytes by which the tightest GPU misses its margin at this ratio; 0 where none does."""
        serving = max(self._cache_bytes(i, ratio) - room for i, room in enumerate(self._rooms))
        return max(0, serving, self._missing_while_loading())

    def taken_at(self, ratio: float) -> tuple[int, ...]:
        """The most bytes of each GPU that the engine holds itself, while it loads or serves."""
        taken = []
        for i, gpu in enumerate(self.gpus):
            serving = self._usable[i] - self.margins[i] - self._rooms[i]
            peak = serving + self._cache_bytes(i, ratio)
            taken.append(max(peak, self._load_peaks[i]) - known(gpu.used, 0))
        return tuple(taken)

    def at(self, ratio: float) -> GroupOutcome:
        """The whole account at one ratio."""
        return GroupOutcome(
            ratio=ratio,
            free=self.free,
            region=self.region_at(ratio),
            tokens=self.tokens_at(ratio),
            ledgers=tuple(self._ledger(i, ratio) for i in range(len(self.gpus))),
        )

    def _cache_bytes(self, i: int, ratio: float) -> int:
        """The cache as the driver holds it, without what is returned by then."""
        return total_bytes(self.cache_terms(i, ratio)) + self._static_memory[i].temporaries

    def _missing_while_loading(self) -> int:
        """Bytes by which the tightest GPU misses its margin while loading; negative: to spare."""
        peaks = zip(self._load_peaks, self.margins, self._usable, strict=True)
        return max(peak + margin - usable for peak, margin, usable in peaks)

    def _late(self, i: int, ratio: float) -> LateMemory:  # noqa: ARG002 - of older engines
        """What one GPU holds after the cache."""
        memory = self._static_memory[i]
        return LateMemory(memory.buffers, self._pool, (*self.transients, *memory.transients))

    def _ledger(self, i: int, ratio: float) -> GpuLedger:
        gpu, late = self.gpus[i], self._late(i, ratio)
        before = self._static_memory[i].before
        body = [*before, *self.cache_terms(i, ratio), *late.buffers, *late.pool]
        steady, load_peak = total_bytes(body), self._load_peaks[i]
        peak = steady - total_bytes(late.pool) + _largest((*late.pool, *late.transients))
        return GpuLedger(
            index=gpu.index,
            uuid=gpu.uuid,
            name=gpu.name,
            total=known(gpu.total, 0),
            reserved=known(gpu.reserved, 0),
            used=known(gpu.used, 0),
            free=known(gpu.free, 0),
            ledger=(*body, *late.transients),
            steady=steady,
            load_peak=load_peak,
            peak=peak,
            headroom=self._usable[i] - max(peak, load_peak),
            margin=self.margins[i],
            withheld=(self.launch.withheld and self.launch.withheld[i]) or UNSET,
        )


def given(gpu: Gpu, free: int) -> Term:
    """Everything before the cache as one line, from the free memory that a log told."""
    before = gpu.usable - free
    note = "all that is not free when the cache is sized"
    return term("before_cache", "before", before, "measured", note)


def total_bytes(terms: Sequence[Term]) -> int:
    """The sum of a ledger's lines."""
    return sum(term.bytes for term in terms)


def _largest(terms: Sequence[Term]) -> int:
    return max((term.bytes for term in terms), default=0)


#: By what is in the GPU's name: lmdeploy lmdeploy/utils.py::get_max_batch_size #1cc12e
_BATCH_BY_NAME: Final = {
    "a100": 384, "a800": 384, "h100": 1024, "h800": 1024, "l20y": 1024, "h200": 1024,
}  # fmt: skip
_BATCH: Final = 128
_PREFILL: Final = 8192  # lmdeploy cli/utils.py::ArgumentHelper.max_prefill_token_num `default=8192`
_RATIO: Final = 0.8  # lmdeploy cli/utils.py::ArgumentHelper.cache_max_entry_count `default=0.8`


def default_batch_size(gpu_name: str) -> int:
    """LMDeploy's ``max_batch_size`` where none is given."""
    name = gpu_name.lower()
    return next((size for key, size in _BATCH_BY_NAME.items() if key in name), _BATCH)


class RankWeights(Struct):
    """Bytes of one rank's weights: all, what a decode step reads, what an image runs through."""

    total: int
    decode: int
    vision: int


class LogFigures(NamedTuple):
    """What an engine's log does not say by itself.

    ``pinned_call`` is the line of its source that asks for page-locked host memory, and
    ``tuning_lengths`` are the warm-up's lengths that no setting changes.
    """

    pinned_call: str = ""
    tuning_lengths: tuple[int, ...] = ()


class Engine(ABC):
    """An engine in one generation; ``version`` is one with presets, e.g. ``0.18``."""

    name: ClassVar[EngineName]
    #: Whether an image that chunked prefill cuts is encoded again in every chunk.
    encodes_again: ClassVar[bool] = False
    #: Blocks of a request beyond its longest. Over. It allocates for a token (TurboMind,
    #: ``inflight_new_tokens``) to 16 (lmdeploy lmdeploy/messages.py `prefill_interval: int = 16`)
    #: before it knows that the answer has ended; and TurboMind keeps a cached block that it copies.
    blocks_ahead: ClassVar[int] = 2
    #: Whether it measures its kernels in a warm-up, and can read what it chose before.
    tunes_kernels: ClassVar[bool] = False
    #: Why its account may not be right for the version that was asked for; None where it is.
    doubt: str | None = None
    log: LogFigures = LogFigures()
    #: Whether ``cache_max_entry_count`` is a share of what is free.
    ratio_of_free: bool = True

    def __init__(self, version: str) -> None:
        self.version = version

    @property
    def planned(self) -> PlannedEngine:
        """The engine as a plan names it."""
        return PlannedEngine(name=self.name, version=self.version)

    def check_options(self, engine_options: Mapping[str, object]) -> None:  # noqa: B027 - most have all
        """Refuse options that every engine of LMDeploy has, and this one has not.

        Raises:
            UsageError: one is given.
        """

    def defaults(self, gpu_name: str) -> dict[str, object]:
        """What LMDeploy takes where nothing is given, on a GPU of this name."""
        return {
            "cache_max_entry_count": _RATIO,
            "max_batch_size": default_batch_size(gpu_name),
            "max_prefill_token_num": _PREFILL,
        }

    @abstractmethod
    def account(self, launch: EngineLaunch) -> Account:
        """Every byte of one engine."""

    @abstractmethod
    def tp_problem(self, model: Model, tp: int) -> str | None:
        """Why the engine would refuse this tensor-parallel degree; None where it would not."""

    @abstractmethod
    def problem(self, launch: EngineLaunch) -> str | None:
        """Why the engine would refuse these options, or die of them; None where it would not."""

    def missing_kernels(self, launch: EngineLaunch) -> str | None:  # noqa: ARG002
        """A sentence: what the engine has no code for on these cards; None where it has all."""
        return None

    @abstractmethod
    def units_bound(self, rule: ImageRule, vision_load: VisionLoad, settings: Settings) -> int:
        """The most vision units that can meet in one forward, never under."""

    def forward_tokens(self, settings: Settings) -> int:
        """Tokens of one forward at most."""
        return settings.max_prefill_token_num

    def prompt_tokens(self, settings: Settings) -> int:
        """Tokens of prompts that one forward reads at least, while a whole batch decodes."""
        return self.forward_tokens(settings)

    @abstractmethod
    def cache(self, model: Model, settings: Settings) -> CacheShape:
        """How one rank's cache is cut."""

    def logged_cache(
        self,
        slabs: Sequence[LoggedSlab],  # noqa: ARG002 - most have no such lines
        settings: Settings,  # noqa: ARG002
    ) -> CacheShape | None:
        """The same by the lines of its log; None where they do not tell."""
        return None

    @abstractmethod
    def weights(self, model: Model, tp: int) -> RankWeights:
        """What one rank holds for good, on a card of no particular kind."""

    def environment(
        self,
        model: Model,  # noqa: ARG002
        settings: Settings,  # noqa: ARG002
        ledgers: Sequence[GpuLedger] = (),  # noqa: ARG002
    ) -> dict[str, str]:
        """Variables that its processes are started with; ``ledgers`` hold it to its plan here."""
        return {}

    @abstractmethod
    def host_memory(
        self, model: Model, settings: Settings, *, units_per_forward: int
    ) -> HostMemory:
        """Host memory of one replica, in bytes, without what the machine has."""

    def warnings(self, settings: Settings) -> tuple[str, ...]:  # noqa: ARG002 - an engine's own
        """What a person should know before this engine runs with these settings."""
        return ()

    def communicator(self, settings: Settings) -> str:
        """How the GPUs of a group reach each other."""
        return settings.communicator

    @abstractmethod
    def prefill_words(self, settings: Settings) -> str:
        """What a person should know of ``max_prefill_token_num`` here."""
