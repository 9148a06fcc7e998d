"""The account of TurboMind before 0.18: the same ledger, with the rules of its generation.

Others hold ``used``; then the context, the communicator and the GEMM workspace, the torch tower
where it comes first, the weights, the cache, and the buffers. What torch keeps of the first image
and what the language model's pool keeps of it are ``pool_warmup``: most of these versions have no
warm-up of their own, so ``steady`` is a server that has answered one image at its default limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from msgspec.structs import replace

from turbofit.core.machine import Gpu, Machine
from turbofit.core.model import Model
from turbofit.core.plan import GpuLedger, Settings, Term
from turbofit.core.struct import known
from turbofit.core.units import round_up
from turbofit.memory.exposure import Exposure
from turbofit.memory.legacy.cache import LegacyCache
from turbofit.memory.legacy.generations import Generation
from turbofit.memory.legacy.terms import LegacyTerms
from turbofit.memory.turbomind.account import RATIO_STEPS, Account, Outcome
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.memory.turbomind.terms import cache_terms

__all__ = ["LegacyAccount", "legacy_account"]


def legacy_account(
    model: Model,
    settings: Settings,
    gpus: Sequence[Gpu],
    machine: Machine,
    exposure: Exposure,
    constants: EngineConstants,
    margins: Sequence[int],
    generation: Generation,
    free_at_cache: int | None = None,
) -> Account | LegacyAccount:
    """The account of one group under one generation; see :class:`LegacyAccount`.

    Where the tower is native (0.16 and 0.17) the account is 0.18's with that generation's
    paddings and workspaces.
    """
    if generation.vision.runs == "native":
        older = replace(
            constants,
            version=generation.first,
            ffn_align_16bit=generation.ffn_align_16bit,
            gemm_workspace=generation.gemm_before,
        )
        return Account(model, settings, gpus, machine, exposure, older, margins, free_at_cache)
    return LegacyAccount(
        model, settings, gpus, machine, exposure, constants, margins, generation, free_at_cache
    )


class LegacyAccount:
    """One model under one set of settings on one group of GPUs, before 0.16.

    Args:
        model: the checkpoint.
        settings: the engine's options; a ``cache_max_entry_count`` of 1 or more counts blocks.
        gpus: the group's GPUs, first the one that stages the load and holds an undivided tower.
        machine: for the links inside the group.
        exposure: what clients can ask of the vision tower.
        constants: 0.18's figures, for what no generation changed (contexts, NCCL, pages).
        margins: bytes to leave free, one for each GPU.
        generation: the rules of the version.
        free_at_cache: free bytes when the cache was sized, as a log said; replaces all before it.
    """

    starved: ClassVar[str] = "that it needs at least ({more} more), and LMDeploy stops"
    dies: ClassVar[str] = "aborts"
    allocator: ClassVar[str] = "the pools of TurboMind and torch"

    def __init__(
        self,
        model: Model,
        settings: Settings,
        gpus: Sequence[Gpu],
        machine: Machine,
        exposure: Exposure,
        constants: EngineConstants,
        margins: Sequence[int],
        generation: Generation,
        free_at_cache: int | None = None,
    ) -> None:
        self.settings, self.generation = settings, generation
        self.gpus, self.margins = tuple(gpus), tuple(margins)
        self.exposure, self.constants = exposure, constants
        self._terms = LegacyTerms(model, settings, gpus, exposure, constants, generation)
        self.units_per_forward = self._terms.units_per_forward
        total = min(self._usable(i) for i in self._ranks)
        self._cache = LegacyCache(model.text, settings, generation, constants, total)
        self.shape = self._cache.shape
        self._pool = self._terms.first_request()
        self.transients = self._terms.cases()
        self._worst = max(term.bytes for term in self.transients)
        if free_at_cache is None:
            self._before = [self._terms.before(i, machine) for i in self._ranks]
            self._staged = self._terms.staged()
        else:
            self._before = [(_given(gpu, free_at_cache),) for gpu in self.gpus]
            self._staged = 0
        held = [_total(terms) for terms in self._before]
        if generation.cache.after_buffers and free_at_cache is None:
            for i in self._ranks:
                held[i] += _total(self._terms.buffers(i, settings.session_len))
        #: Free bytes that the engine sees when it sizes the cache; negative where nothing is left.
        self.free = min(self._usable(i) - held[i] for i in self._ranks)

    @property
    def sizable(self) -> int:
        """Bytes of which the ratio takes its share; negative where nothing is left."""
        return self.free

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block on one rank."""
        return self.shape.block_bytes

    @property
    def block_tokens(self) -> int:
        """Tokens of one KV block."""
        return self.shape.block_tokens

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values on one rank."""
        return self.block_bytes // self.block_tokens

    @property
    def least_blocks(self) -> int:
        """KV blocks with fewer of which the engine stops."""
        return 1

    def region_at(self, ratio: float) -> int:
        """Bytes of the cache on each rank; a ratio of 1 or more counts blocks."""
        return self._cache.region(self.free, ratio)

    def tokens_at(self, ratio: float) -> int:
        """KV tokens that the cache holds."""
        return self._cache.tokens(self.region_at(ratio))

    def blocks_at(self, ratio: float) -> int:
        """KV blocks, as these versions log them (``max_block_count``)."""
        return self.tokens_at(ratio) // self.block_tokens

    def starved_at(self, ratio: float) -> bool:
        """Whether not even one block fits."""
        return self.blocks_at(ratio) < self.least_blocks

    def fits_at(self, ratio: float) -> bool:
        """Whether every GPU keeps its margin at this ratio."""
        return self.missing_at(ratio) == 0

    def missing_at(self, ratio: float) -> int:
        """Bytes by which the tightest GPU misses its margin at this ratio; 0 where none does."""
        return max(0, *(one.margin - one.headroom for one in self.at(ratio).ledgers))

    def best_ratio(self) -> float | None:
        """The largest multiple of 0.001 that leaves every margin; None where no cache fits."""
        low, high = 0, RATIO_STEPS - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits_at(middle / RATIO_STEPS):
                low = middle
            else:
                high = middle - 1
        return low / RATIO_STEPS or None

    def at(self, ratio: float) -> Outcome:
        """The whole account at one ratio."""
        return Outcome(
            ratio=ratio,
            free=self.free,
            region=self.region_at(ratio),
            tokens=self.tokens_at(ratio),
            ledgers=tuple(self._ledger(i, ratio) for i in self._ranks),
        )

    def cache_terms(self, i: int, ratio: float) -> list[Term]:  # noqa: ARG002  alike on all GPUs
        """The cache of one GPU as lines of its ledger."""
        region = round_up(self.region_at(ratio), self.constants.pool_granularity)
        return cache_terms(region, ratio, 0)

    @property
    def _ranks(self) -> range:
        return range(len(self.gpus))

    def _usable(self, i: int) -> int:
        return known(self.gpus[i].total, 0) - known(self.gpus[i].reserved, 0)

    def _session_at(self, ratio: float) -> int:
        """``session_len`` as the engine truncates it to its cache, where that comes first."""
        rule, wanted = self.generation.cache, self.settings.session_len
        if not rule.truncates_session or rule.after_buffers:
            return wanted
        return min(wanted, max(1, self.tokens_at(ratio)))

    def _loaded(self, i: int) -> int:
        """The most that one GPU holds while loading; the first stages tensors through torch."""
        phases = ("before", "context", "weights")
        held = [t for t in self._before[i] if t.phase in phases and t.term != "torch_cache"]
        return _total(held) + (self._staged if i == 0 else 0)

    def _ledger(self, i: int, ratio: float) -> GpuLedger:
        gpu = self.gpus[i]
        buffers = self._terms.buffers(i, self._session_at(ratio))
        body = [*self._before[i], *self.cache_terms(i, ratio), *buffers, self._pool]
        steady = _total(body)
        peak = steady - self._pool.bytes + max(self._pool.bytes, self._worst)
        load_peak = max(_total(self._before[i]), self._loaded(i))
        return GpuLedger(
            index=gpu.index,
            uuid=gpu.uuid,
            name=gpu.name,
            total=known(gpu.total, 0),
            reserved=known(gpu.reserved, 0),
            used=known(gpu.used, 0),
            free=known(gpu.free, 0),
            ledger=(*body, *self.transients),
            steady=steady,
            load_peak=load_peak,
            peak=peak,
            headroom=self._usable(i) - max(peak, load_peak),
            margin=self.margins[i],
        )


def _given(gpu: Gpu, free: int) -> Term:
    """Everything before the cache as one line, from the free memory that a log told."""
    before = known(gpu.total, 0) - known(gpu.reserved, 0) - free
    note = "all that is not free when the cache is sized"
    return Term(term="before_cache", phase="before", bytes=before, basis="measured", note=note)


def _total(terms: Sequence[Term]) -> int:
    return sum(term.bytes for term in terms)
