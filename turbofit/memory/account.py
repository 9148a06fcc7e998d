"""The account of one group of GPUs at any cache ratio: what every engine's account has in common.

Others hold ``used``; then come contexts and communicators, then the weights. Then free memory is
read, the smallest of the group counts, and a ratio of it becomes the cache. What is allocated later
must live in what the ratio left. An engine's own account says how much each of these is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Final, NamedTuple

from turbofit.core.machine import Calibration, Gpu
from turbofit.core.plan import GpuLedger, Settings, Term
from turbofit.core.struct import Struct, known

__all__ = [
    "RATIO_STEPS",
    "TEMPORARIES",
    "Account",
    "GroupOutcome",
    "LateMemory",
    "StaticMemory",
    "given",
    "total_bytes",
]

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

    @property
    def fits(self) -> bool:
        """Whether every GPU keeps its margin."""
        return all(ledger.fits for ledger in self.ledgers)


class StaticMemory(Struct):
    """What one GPU holds whatever the ratio is.

    ``before`` is there when free memory is read, ``buffers`` are persistent and come after the
    cache. ``temporaries`` are bytes of ``before`` that are gone before the first request;
    ``staged`` is the most that loading holds above the rest of ``before``. ``transients`` are the
    alternatives that this GPU alone has.
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
        settings: the engine's options; the ratio comes later, in :meth:`at`.
        gpus: the group's GPUs.
        margins: bytes to leave free, one for each GPU.
        static: what each GPU holds whatever the ratio is.
        pool: the term that transients share room with: what the engine's allocator keeps after its
            warm-up; None where the engine has none.
        transients: the alternatives on every GPU; the largest decides.
        units_per_forward: vision units that the largest of them pays for.
        calibration: what was measured of such a launch, where it was; its corrections are in
            ``static`` already.
    """

    #: For whom a cache is too small, and what the engine then does; ``{more}`` is what is missing.
    cache_shortfall: ClassVar[str]
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

    def __init__(  # noqa: PLR0913 - a constructor
        self,
        settings: Settings,
        gpus: Sequence[Gpu],
        margins: Sequence[int],
        static: Sequence[StaticMemory],
        pool: Term | None,
        transients: Sequence[Term],
        units_per_forward: int,
        calibration: Calibration | None = None,
    ) -> None:
        self.calibration = calibration
        self.settings = settings
        self.gpus = tuple(gpus)
        self.margins = tuple(margins)
        self.units_per_forward = units_per_forward
        self._static_memory = tuple(static)
        self._pool = () if pool is None else (pool,)
        self._pool_bytes = total_bytes(self._pool)
        self.transients = tuple(transients)
        #: Each GPU's largest transient, or the pool that it lives in.
        self._worst = [
            max(self._pool_bytes, *(term.bytes for term in (*transients, *one.transients)), 0)
            for one in static
        ]
        self._before_bytes = [total_bytes(one.before) for one in static]
        self._buffer_bytes = [total_bytes(one.buffers) for one in static]
        #: Free bytes that the engine sees when it sizes the cache; negative where nothing is left.
        self.free = min(self._usable(i) - self._before_bytes[i] for i in range(len(self.gpus)))
        self._best: float | None = None

    @property
    def ratio_base(self) -> int:
        """Bytes of which the ratio takes its share; negative where nothing is left."""
        return self.free

    @property
    @abstractmethod
    def block_bytes(self) -> int:
        """Bytes of one KV block on one rank."""

    @property
    @abstractmethod
    def block_tokens(self) -> int:
        """Tokens of one KV block."""

    @property
    @abstractmethod
    def least_blocks(self) -> int:
        """The fewest KV blocks with which the engine starts under the given settings."""

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

    def blocks_at(self, ratio: float) -> int:
        """KV blocks that the engine counts against ``least_blocks``."""
        return self.tokens_at(ratio) // self.block_tokens

    def cache_shortfall_at(self, ratio: float) -> int:
        """Bytes of cache that the engine lacks to start under these settings; 0 where it starts."""
        return max(0, self.least_blocks - self.blocks_at(ratio)) * self.block_bytes

    def best_ratio(self) -> float | None:
        """The largest multiple of 0.001 that leaves every margin; None where no cache fits."""
        if self._best is None:
            self._best = self._find_ratio()
        return self._best or None

    def _find_ratio(self) -> float:
        """The best ratio, 0 where there is none."""
        if self.ratio_base <= 0 or not self._loads():
            return 0.0
        room = min(self._room(i) for i in range(len(self.gpus)))
        steps = min(RATIO_STEPS - 1, max(0, room) * RATIO_STEPS // self.ratio_base + 1)
        while steps > 0 and not self.fits_at(steps / RATIO_STEPS):
            steps -= 1
        return steps / RATIO_STEPS

    def fits_at(self, ratio: float) -> bool:
        """Whether every GPU keeps its margin at this ratio."""
        return self.missing_at(ratio) == 0

    def missing_at(self, ratio: float) -> int:
        """Bytes by which the tightest GPU misses its margin at this ratio; 0 where none does."""
        gpus = range(len(self.gpus))
        serving = max(self._cache_bytes(i, ratio) - self._room(i) for i in gpus)
        loading = max(self._load_peak(i) + self.margins[i] - self._usable(i) for i in gpus)
        return max(0, serving, loading)

    def taken_at(self, ratio: float) -> tuple[int, ...]:
        """The most bytes of each GPU that the engine holds itself, while it loads or serves."""
        taken = []
        for i, gpu in enumerate(self.gpus):
            serving = self._usable(i) - self.margins[i] - self._room(i)
            peak = serving + self._cache_bytes(i, ratio)
            taken.append(max(peak, self._load_peak(i)) - known(gpu.used, 0))
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

    def _usable(self, i: int) -> int:
        return self.gpus[i].usable

    def _cache_bytes(self, i: int, ratio: float) -> int:
        """The cache as the driver holds it, without what is returned by then."""
        return total_bytes(self.cache_terms(i, ratio)) + self._static_memory[i].temporaries

    def _room(self, i: int) -> int:
        """Bytes that the cache may take on one GPU."""
        static = self._before_bytes[i] - self._static_memory[i].temporaries + self._buffer_bytes[i]
        return self._usable(i) - self.margins[i] - static - self._worst[i]

    def _loads(self) -> bool:
        return all(
            self._load_peak(i) + self.margins[i] <= self._usable(i) for i in range(len(self.gpus))
        )

    def _load_peak(self, i: int) -> int:
        """The most that one GPU holds while loading."""
        one = self._static_memory[i]
        return self._before_bytes[i] - one.temporaries + max(one.staged, one.temporaries)

    def _late(self, i: int, ratio: float) -> LateMemory:  # noqa: ARG002 - of older engines
        """What one GPU holds after the cache."""
        one = self._static_memory[i]
        return LateMemory(one.buffers, self._pool, (*self.transients, *one.transients))

    def _ledger(self, i: int, ratio: float) -> GpuLedger:
        gpu, late = self.gpus[i], self._late(i, ratio)
        before = self._static_memory[i].before
        body = [*before, *self.cache_terms(i, ratio), *late.buffers, *late.pool]
        steady = total_bytes(body)
        pool = total_bytes(late.pool)
        peak = steady - pool + max(pool, *(term.bytes for term in late.transients), 0)
        load_peak = self._load_peak(i)
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
            headroom=self._usable(i) - max(peak, load_peak),
            margin=self.margins[i],
        )


def given(gpu: Gpu, free: int) -> Term:
    """Everything before the cache as one line, from the free memory that a log told."""
    before = gpu.usable - free
    note = "all that is not free when the cache is sized"
    return Term(term="before_cache", phase="before", bytes=before, basis="measured", note=note)


def total_bytes(terms: Sequence[Term]) -> int:
    """The sum of a ledger's lines."""
    return sum(term.bytes for term in terms)
