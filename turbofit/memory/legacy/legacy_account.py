"""The account of TurboMind before 0.18: the same ledger, with the rules of its generation.

Others hold ``used``; then the context, the communicator and the GEMM workspace, the torch tower
where it comes first, the weights, the cache, and the buffers. What torch keeps of the first image
and what the language model's pool keeps of it are ``pool_warmup``: most of these versions have no
warm-up of their own, so ``steady`` is a server that has answered one image at its default limit.
"""

from __future__ import annotations

from typing import ClassVar

from msgspec.structs import replace

from turbofit.core.plan import Term
from turbofit.memory.account import Account, LateMemory, given, total_bytes
from turbofit.memory.launch import EngineLaunch
from turbofit.memory.legacy.cache import LegacyCache
from turbofit.memory.legacy.forward import LegacyForward
from turbofit.memory.legacy.generations import Generation
from turbofit.memory.legacy.group import GroupAccount
from turbofit.memory.legacy.terms import LegacyTerms
from turbofit.memory.legacy.weights import older_layouts
from turbofit.memory.turbomind.account import TurbomindAccount
from turbofit.memory.turbomind.constants import EngineConstants

__all__ = ["LegacyAccount", "legacy_account"]


def legacy_account(
    launch: EngineLaunch, constants: EngineConstants, generation: Generation
) -> Account:
    """The account of one engine of one generation; see :class:`LegacyAccount`.

    Where the tower is native (0.16 and 0.17) the account is 0.18's with that generation's
    paddings and workspaces.
    """
    if generation.vision.runs == "native":
        older = replace(
            older_layouts(constants, generation),
            version=generation.first,
            gemm_workspace=(),
            gemm_in_context=generation.gemm_before,
            copied_16bit=generation.copied_16bit,
        )
        return TurbomindAccount(launch, older)
    kind = _WarmedAccount if generation.cache.objects else LegacyAccount
    return kind(launch, constants, generation)


class LegacyAccount(GroupAccount):
    """One model under one set of settings on one group of GPUs, before 0.16.

    Args:
        launch: the engine on its group; the ratio comes later, in :meth:`at`.
        constants: 0.18's figures, for what no generation changed (contexts, NCCL, pages).
        generation: the rules of the version.
    """

    def __init__(
        self, launch: EngineLaunch, constants: EngineConstants, generation: Generation
    ) -> None:
        model, settings, gpus = launch.model, launch.settings, launch.gpus
        vision_load, free_at_cache = launch.vision_load, launch.free_at_cache
        self.generation, self.vision_load, self.constants = generation, vision_load, constants
        self._terms = terms = LegacyTerms(model, settings, gpus, vision_load, constants, generation)
        ranks = range(len(gpus))
        if free_at_cache is None:
            before = [terms.before(i, launch.machine) for i in ranks]
        else:
            before = [(given(gpu, free_at_cache),) for gpu in gpus]
        #: Whether the buffers are part of what is not free when a log tells it.
        self._buffers_given = generation.cache.after_buffers and free_at_cache is not None
        # Upper ends: a cache that cuts no session.
        forward = terms.forward(max(settings.session_len, terms.forward(1).buffer_tokens))
        super().__init__(
            settings,
            gpus,
            launch.margins,
            before,
            [self._buffers(i, forward) for i in ranks],
            terms.first_request(forward),
            terms.cases(forward),
            terms.staged() if free_at_cache is None else 0,
            terms.units_per_forward,
            forward.pool(forward.warmup_tokens, forward.warmup_tokens),
        )
        total = min(gpu.usable for gpu in gpus)
        self._cache = LegacyCache(model.text, settings, generation, constants, total)
        self.shape = self._cache.shape
        if generation.cache.after_buffers and free_at_cache is None:
            self.free = min(
                gpu.usable - total_bytes(one.before) - total_bytes(one.buffers)
                for gpu, one in zip(gpus, self._static_memory, strict=True)
            )

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block on one rank."""
        return self.shape.block_bytes

    @property
    def block_tokens(self) -> int:
        """Tokens of one KV block."""
        return self.shape.block_tokens

    def region_at(self, ratio: float) -> int:
        """Bytes of the cache on each rank; a ratio of 1 or more counts blocks."""
        return self._cache.region(self.free, ratio)

    def tokens_at(self, ratio: float) -> int:
        """KV tokens that the cache holds."""
        return self._cache.tokens(self.region_at(ratio))

    def _buffers(self, i: int, forward: LegacyForward) -> tuple[Term, ...]:
        return () if self._buffers_given else self._terms.buffers(i, forward)

    def _late(self, i: int, ratio: float) -> LateMemory:
        """What one GPU holds after the cache, for the sequences that the cache admits."""
        terms, forward = self._terms, self._terms.forward(self.tokens_at(ratio))
        return LateMemory(
            self._buffers(i, forward), (terms.first_request(forward),), terms.cases(forward)
        )


class _WarmedAccount(LegacyAccount):
    """Of 0.15: no cut session, and a warm-up whose requests wait for blocks of the cache."""

    cache_shortfall: ClassVar[str] = TurbomindAccount.cache_shortfall

    @property
    def least_blocks(self) -> int:
        """KV blocks that the longest warm-up request needs: with fewer, start-up never ends."""
        forward = self._terms.forward(self.settings.session_len)
        return -(-forward.warmup_tokens // self.block_tokens)
