"""The PyTorch engine's account: every byte of one tensor-parallel group at any cache ratio."""

from __future__ import annotations

from typing import ClassVar

from turbofit.core.plan import Term
from turbofit.core.struct import known
from turbofit.core.units import round_up
from turbofit.memory.account import Account, StaticMemory, given
from turbofit.memory.calibrated import calibration_for, corrected
from turbofit.memory.launch import EngineLaunch
from turbofit.memory.pytorch.bound import UnitsMet, units_met
from turbofit.memory.pytorch.cache import (
    RESERVED_BLOCKS,
    block_bytes,
    block_tokens,
    blocks_held,
    runtime_bytes,
    state_bytes,
)
from turbofit.memory.pytorch.constants import PytorchConstants
from turbofit.memory.pytorch.draft import activations_of, draft_staged
from turbofit.memory.pytorch.terms import (
    before_terms,
    buffer_terms,
    cache_term,
    pool_term,
    state_term,
    transient_terms,
    weight_terms,
)
from turbofit.memory.pytorch.weights import largest_loaded, staged_copy
from turbofit.memory.shared_terms import capability_of

__all__ = ["PytorchAccount"]


class PytorchAccount(Account):
    """One model under one set of settings on one group of GPUs.

    Args:
        launch: the engine on its group; the ratio comes later, in :meth:`at`.
        constants: the engine generation's figures.
    """

    cache_shortfall: ClassVar[str] = (
        "that LMDeploy asks for ({more} more): with fewer it halves max_prefill_token_num, or"
        " stops with 'No enough gpu memory for kv cache.'"
    )
    dies: ClassVar[str] = "serves no more (every request gets 503 while /health stays 200)"
    allocator: ClassVar[str] = "torch's allocator"

    def __init__(self, launch: EngineLaunch, constants: PytorchConstants) -> None:
        model, settings, gpus = launch.model, launch.settings, launch.gpus
        vision_load = launch.vision_load
        self.constants = constants
        self._block_bytes = block_bytes(model.text, settings)
        self._block_tokens = block_tokens(model.text, settings)
        self._runtime = runtime_bytes(model.text, settings)
        self._state = state_bytes(model.text, settings)
        work = activations_of(model, settings, constants, gpus)
        met = UnitsMet(0, 0)
        if model.image_rule is not None and vision_load.units_per_image:
            met = units_met(model.image_rule, vision_load, settings)
        transients = transient_terms(model, work, settings, vision_load, met, constants)
        linked = launch.machine.nvlinked(gpus)
        capability = capability_of(gpus[0])
        weights = weight_terms(model, settings, capability, constants)
        largest = max(
            largest_loaded(model, settings.tp),
            staged_copy(model, settings.tp, capability, constants),
            draft_staged(settings),
        )
        staged = round_up(largest, constants.page)
        held = []
        for gpu in gpus:
            # At most as many as an empty card could hold: its tables are small. Over.
            most = settings.num_gpu_blocks or known(gpu.total, 0) // self._block_bytes
            buffers = tuple(buffer_terms(model, work, settings, gpu, most, constants))
            if self._state:
                region = round_up(self._state, constants.page)
                buffers = (state_term(region, settings), *buffers)
            if launch.free_at_cache is None:
                before = (*before_terms(gpu, settings, linked, constants), *weights)
                held.append(StaticMemory(before=before, buffers=buffers, staged=staged))
            else:
                held.append(
                    StaticMemory(before=(given(gpu, launch.free_at_cache),), buffers=buffers)
                )
        pool = pool_term(work, settings, constants)
        seen = calibration_for(launch.machine, gpus, model, settings, "pytorch", constants.version)
        held = [corrected(one, seen) for one in held]
        margins = launch.margins_with(seen)
        super().__init__(settings, gpus, margins, held, pool, transients, met.now, seen)

    def _find_ratio(self) -> float:
        """Blocks that were asked for are as many at every ratio: one look tells that none fits."""
        if self.settings.num_gpu_blocks and not self.fits_at(1.0):
            return 0.0
        return super()._find_ratio()

    @property
    def ratio_base(self) -> int:
        """What is free less the states of delta nets and the runtime's reserve.

        The former are allocated beside the cache; the latter nothing else keeps.
        """
        return self.free - self._state - self._runtime

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block on one rank."""
        return self._block_bytes

    @property
    def block_tokens(self) -> int:
        """Tokens of one KV block."""
        return self._block_tokens

    @property
    def least_blocks(self) -> int:
        """Blocks below which the engine changes ``max_prefill_token_num`` or stops."""
        return self.constants.least_blocks

    def blocks_at(self, ratio: float) -> int:
        """Blocks of the ratio's share: what is checked even where ``num_gpu_blocks`` is set."""
        return max(0, int(self.ratio_base * ratio)) // self._block_bytes

    def cache_shortfall_at(self, ratio: float) -> int:
        """Bytes of cache missing for as many blocks, with what the runtime's reserve lacks."""
        share = int(self.ratio_base * ratio)
        if share // self._block_bytes >= self.least_blocks:
            return 0
        return self.least_blocks * self._block_bytes - share

    def region_at(self, ratio: float) -> int:
        """Bytes of the cache on each rank."""
        return blocks_held(self.ratio_base, ratio, self._block_bytes, self.settings) * (
            self._block_bytes
        )

    def tokens_at(self, ratio: float) -> int:
        """KV tokens that requests can have: the engine keeps two blocks for itself."""
        blocks = blocks_held(self.ratio_base, ratio, self._block_bytes, self.settings)
        return max(0, blocks - RESERVED_BLOCKS) * self.block_tokens

    def cache_terms(self, i: int, ratio: float) -> list[Term]:  # noqa: ARG002 - equal on all
        """The cache, one allocation."""
        region = round_up(self.region_at(ratio), self.constants.page)
        return [cache_term(region, ratio, self.settings)]
