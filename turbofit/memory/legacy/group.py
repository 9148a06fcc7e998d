"""What the accounts of all older engines have in common: one group of GPUs at any cache ratio."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from turbofit.core.machine import Gpu
from turbofit.core.plan import GpuLedger, Settings, Term
from turbofit.core.struct import known
from turbofit.core.units import round_up
from turbofit.memory.turbomind.account import RATIO_STEPS, Outcome
from turbofit.memory.turbomind.terms import cache_terms

__all__ = ["GroupAccount", "given", "total_bytes", "usable"]

_PAGE = 2 << 20


class GroupAccount(ABC):
    """One model under one set of settings on one group of GPUs.

    Args:
        settings: the engine's options; the ratio comes later, in :meth:`at`.
        gpus: the group's GPUs.
        margins: bytes to leave free, one for each GPU.
        before: each GPU's terms that are there when free memory is read.
        pool: what the allocators keep of the warm-up and the first request.
        transients: the alternatives; the largest decides.
        staged: bytes that loading holds on the first GPU above its weights.
        units_per_forward: vision units that the largest transient pays for.
        own_warmup: bytes of ``pool`` that the engine takes before any request.
    """

    dies: ClassVar[str] = "aborts"
    starved: ClassVar[str] = "that it needs at least ({more} more), and LMDeploy stops"
    allocator: ClassVar[str] = "the pools of TurboMind and torch"

    def __init__(
        self,
        settings: Settings,
        gpus: Sequence[Gpu],
        margins: Sequence[int],
        before: Sequence[Sequence[Term]],
        pool: Term,
        transients: Sequence[Term],
        staged: int,
        units_per_forward: int,
        own_warmup: int = 0,
    ) -> None:
        self.settings, self.gpus, self.margins = settings, tuple(gpus), tuple(margins)
        self.transients = tuple(transients)
        self.units_per_forward = units_per_forward
        self.own_warmup = own_warmup
        self._before = [tuple(terms) for terms in before]
        self._pool, self._staged = pool, staged
        self._worst = max((term.bytes for term in transients), default=0)
        #: Free bytes that the engine sees when it sizes the cache; negative where nothing is left.
        self.free = min(
            usable(gpu) - total_bytes(terms)
            for gpu, terms in zip(self.gpus, self._before, strict=True)
        )

    @property
    @abstractmethod
    def sizable(self) -> int:
        """Bytes of which the ratio takes its share; negative where nothing is left."""

    @property
    @abstractmethod
    def block_bytes(self) -> int:
        """Bytes of one KV block on one rank."""

    @property
    @abstractmethod
    def block_tokens(self) -> int:
        """Tokens of one KV block."""

    @abstractmethod
    def region_at(self, ratio: float) -> int:
        """Bytes of the cache on each rank."""

    @abstractmethod
    def tokens_at(self, ratio: float) -> int:
        """KV tokens that the cache holds."""

    @abstractmethod
    def buffers_at(self, i: int, ratio: float) -> tuple[Term, ...]:
        """What one GPU holds for good after the cache, without the pools."""

    @property
    def least_blocks(self) -> int:
        """KV blocks with fewer of which the engine stops."""
        return 1

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values on one rank."""
        return self.block_bytes // self.block_tokens

    def blocks_at(self, ratio: float) -> int:
        """KV blocks of the cache."""
        return self.tokens_at(ratio) // self.block_tokens

    def starved_at(self, ratio: float) -> bool:
        """Whether the cache is too small for the engine to start."""
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
            ledgers=tuple(self._ledger(i, ratio) for i in range(len(self.gpus))),
        )

    def _load_peak(self, i: int) -> int:
        """The most that one GPU holds while loading; the first stages tensors through torch."""
        phases = ("before", "context", "weights")
        held = [t for t in self._before[i] if t.phase in phases and t.term != "torch_cache"]
        return max(
            total_bytes(self._before[i]), total_bytes(held) + (self._staged if i == 0 else 0)
        )

    def _ledger(self, i: int, ratio: float) -> GpuLedger:
        gpu = self.gpus[i]
        cache = cache_terms(round_up(self.region_at(ratio), _PAGE), ratio, 0)
        body = [*self._before[i], *cache, *self.buffers_at(i, ratio), self._pool]
        steady = total_bytes(body)
        peak = steady - self._pool.bytes + max(self._pool.bytes, self._worst)
        load_peak = self._load_peak(i)
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
            headroom=usable(gpu) - max(peak, load_peak),
            margin=self.margins[i],
        )


def usable(gpu: Gpu) -> int:
    """Bytes of a card that CUDA can hand out."""
    return known(gpu.total, 0) - known(gpu.reserved, 0)


def given(gpu: Gpu, free: int) -> Term:
    """Everything before the cache as one line, from the free memory that a log told."""
    note = "all that is not free when the cache is sized"
    before = usable(gpu) - free
    return Term(term="before_cache", phase="before", bytes=before, basis="measured", note=note)


def total_bytes(terms: Sequence[Term]) -> int:
    """The sum of a ledger's lines."""
    return sum(term.bytes for term in terms)
