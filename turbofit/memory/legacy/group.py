"""What the accounts of all older engines add to the common one.

What the allocators keep of the first image is part of ``pool_warmup``, as most of them warm nothing
up; and what comes after the cache can depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from turbofit.core.machine import Gpu
from turbofit.core.plan import Settings, Term
from turbofit.core.units import round_up
from turbofit.memory.account import Account, StaticMemory
from turbofit.memory.turbomind.terms import cache_terms

__all__ = ["GroupAccount"]

_PAGE = 2 << 20
#: What torch keeps of loading: part of ``before``, and of its peak.
_KEPT = "torch_cache"


class GroupAccount(Account):
    """One model under one set of settings on one group of GPUs.

    Args:
        settings: the engine's options; the ratio comes later, in :meth:`at`.
        gpus: the group's GPUs.
        margins: bytes to leave free, one for each GPU.
        before: each GPU's terms that are there when free memory is read.
        buffers: each GPU's persistent terms after the cache, at their largest.
        pool: what the allocators keep of the warm-up and the first request.
        transients: the alternatives; the largest decides.
        staged: bytes that loading holds on the first GPU above its weights.
        units_per_forward: vision units that the largest transient pays for.
        engine_warmup: bytes of ``pool`` that the engine takes before any request.
    """

    dies: ClassVar[str] = "aborts"
    cache_shortfall: ClassVar[str] = "that it needs at least ({more} more), and LMDeploy stops"
    allocator: ClassVar[str] = "the pools of TurboMind and torch"
    warmup_words: ClassVar[str] = "in LMDeploy's own warm-up or with its first image"
    admits_prompts: ClassVar[bool] = False  # the tower is Python, before the engine

    def __init__(  # noqa: PLR0913 - a constructor
        self,
        settings: Settings,
        gpus: Sequence[Gpu],
        margins: Sequence[int],
        before: Sequence[Sequence[Term]],
        buffers: Sequence[Sequence[Term]],
        pool: Term,
        transients: Sequence[Term],
        staged: int,
        units_per_forward: int,
        engine_warmup: int = 0,
    ) -> None:
        held = []
        for i, (early, late) in enumerate(zip(before, buffers, strict=True)):
            kept = sum(term.bytes for term in early if term.term == _KEPT)
            extra = max(0, staged - kept) if i == 0 else 0
            held.append(StaticMemory(before=tuple(early), buffers=tuple(late), staged=extra))
        super().__init__(settings, gpus, margins, held, pool, transients, units_per_forward)
        self.engine_warmup = engine_warmup

    @property
    def least_blocks(self) -> int:
        """The fewest KV blocks with which the engine starts."""
        return 1

    def cache_terms(self, i: int, ratio: float) -> list[Term]:  # noqa: ARG002 - alike on all GPUs
        """The cache of one GPU as lines of its ledger."""
        return cache_terms(round_up(self.region_at(ratio), _PAGE), ratio, 0)

    def missing_at(self, ratio: float) -> int:
        """Bytes by which the tightest GPU misses its margin at this ratio; 0 where none does."""
        return max(0, *(one.margin - one.headroom for one in self.at(ratio).ledgers))
