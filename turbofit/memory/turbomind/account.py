"""TurboMind's account: every byte of one tensor-parallel group at any cache ratio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from turbofit.core.plan import Term
from turbofit.core.units import round_up
from turbofit.memory.account import Account, StaticMemory, given
from turbofit.memory.calibrated import calibration_for, corrected
from turbofit.memory.launch import EngineLaunch
from turbofit.memory.shared_terms import capability_of
from turbofit.memory.turbomind.bound import engine_bound
from turbofit.memory.turbomind.cache import cache_shape, region_bytes, tokens_held, tokens_planned
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.memory.turbomind.loading import loading_extra, staging_bytes, temporary_bytes
from turbofit.memory.turbomind.pool import PoolModel
from turbofit.memory.turbomind.terms import (
    FUSES_NOTHING,
    before_terms,
    buffer_terms,
    cache_terms,
    transient_terms,
    warmup_term,
    warmup_tokens,
    weight_terms,
)

__all__ = ["TurbomindAccount"]


class TurbomindAccount(Account):
    """One model under one set of settings on one group of GPUs.

    Args:
        launch: the engine on its group; the ratio comes later, in :meth:`at`.
        constants: the engine generation's figures.
    """

    cache_shortfall: ClassVar[str] = (
        "that one warm-up request needs ({more} more), and LMDeploy waits without a word"
    )
    dies: ClassVar[str] = "aborts"
    allocator: ClassVar[str] = "the executor's pool"

    def __init__(self, launch: EngineLaunch, constants: EngineConstants) -> None:
        model, settings, gpus = launch.model, launch.settings, launch.gpus
        vision_load = launch.vision_load
        self.constants = constants
        self.vision_load = vision_load
        self.shape = cache_shape(model.text, settings, constants)
        units = 0
        if model.image_rule is not None and vision_load.units_per_image:
            units = vision_load.budgeted_units(
                engine_bound(model.image_rule, vision_load, settings)
            )
        fuses = capability_of(gpus[0], unknown=FUSES_NOTHING)
        pool = PoolModel(model, settings, constants, fuses)
        transients = transient_terms(
            pool, model.image_rule, settings, vision_load, units, constants
        )
        buffers = [tuple(buffer_terms(model, settings, gpu, constants)) for gpu in gpus]
        self._temporaries = 0
        if launch.free_at_cache is not None:
            held = [
                StaticMemory(before=(given(gpu, launch.free_at_cache),), buffers=later)
                for gpu, later in zip(gpus, buffers, strict=True)
            ]
        else:
            held = self._held_by(launch, buffers)
        warmup = warmup_term(pool, settings, constants)
        seen = calibration_for(
            launch.machine, gpus, model, settings, "turbomind", constants.version
        )
        held = [corrected(one, seen) for one in held]
        margins = launch.margins_with(seen)
        super().__init__(settings, gpus, margins, held, warmup, transients, units, seen)

    def _held_by(
        self, launch: EngineLaunch, buffers: Sequence[tuple[Term, ...]]
    ) -> list[StaticMemory]:
        model, settings, gpus = launch.model, launch.settings, launch.gpus
        constants, page = self.constants, self.constants.pool_granularity
        capability = capability_of(gpus[0])
        temporaries = temporary_bytes(model, settings, constants, capability)
        self._temporaries = round_up(temporaries, page)
        loading = round_up(loading_extra(model, settings, constants, capability), page)
        staging = staging_bytes(model, settings, constants)
        linked = launch.machine.nvlinked(gpus)
        weights = weight_terms(model, settings, self._temporaries, constants, capability)
        return [
            StaticMemory(
                before=(*before_terms(gpu, settings, i == 0, linked, constants), *weights),
                buffers=buffers[i],
                temporaries=self._temporaries,
                # The first GPU stages tensors through torch.
                staged=loading + (staging if i == 0 else 0),
            )
            for i, gpu in enumerate(gpus)
        ]

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block on one rank."""
        return self.shape.block_bytes

    @property
    def block_tokens(self) -> int:
        """Tokens of one KV block."""
        return self.shape.block_tokens

    @property
    def least_blocks(self) -> int:
        """KV blocks that the longest warm-up request needs: with fewer, start-up never ends."""
        tokens = warmup_tokens(self.settings, self.constants)
        return -(-tokens // self.shape.block_tokens)

    def region_at(self, ratio: float) -> int:
        """Bytes of the cache on each rank."""
        return region_bytes(max(0, self.free), ratio)

    def tokens_at(self, ratio: float) -> int:
        """KV tokens that the cache holds, at least."""
        return tokens_planned(self.region_at(ratio), self.shape, self.constants, self.settings)

    def blocks_at(self, ratio: float) -> int:
        """KV blocks for the warm-up's one request."""
        held = tokens_held(self.region_at(ratio), self.shape, self.constants)
        return held // self.block_tokens

    def cache_terms(self, i: int, ratio: float) -> list[Term]:  # noqa: ARG002 - equal on all
        """The cache in whole pages, with the doubt about the temporaries."""
        rounded = round_up(self.region_at(ratio), self.constants.pool_granularity)
        return cache_terms(rounded, ratio, self._temporaries, self.shape.state_bytes)
