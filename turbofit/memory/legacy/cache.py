"""The cache of older TurboMinds: sessions, or blocks of tokens, or pages as in 0.18."""

from __future__ import annotations

from turbofit.core.model import TextDims
from turbofit.core.plan import Settings
from turbofit.memory.legacy.generations import CacheRule, Generation
from turbofit.memory.turbomind.cache import CacheShape, cache_shape, tokens_held
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.memory.turbomind.weights import kv_heads_held

__all__ = ["LegacyCache"]


class LegacyCache:
    """One rank's cache under one set of settings; sizes in bytes.

    Args:
        text: the language model.
        settings: the engine's options; ``cache_max_entry_count`` of 1 or more counts blocks.
        generation: its rules.
        constants: the figures of pages and slabs.
        total: what ``cudaMemGetInfo`` calls total, for the generations that take a ratio of it.
    """

    def __init__(
        self,
        text: TextDims,
        settings: Settings,
        generation: Generation,
        constants: EngineConstants,
        total: int,
    ) -> None:
        self._rule, self._constants, self._total = generation.cache, constants, total
        self._batch = settings.max_batch_size
        if self._rule.objects:
            self.shape = cache_shape(text, settings, constants)
            return
        tokens = settings.session_len if self._rule.of == "slots" else settings.cache_block_seq_len
        block = _token_bytes(text, settings, self._rule) * tokens
        self.shape = CacheShape(
            block_bytes=block, block_tokens=tokens, slab_bytes=block, blocks_per_slab=1
        )

    def region(self, free: int, ratio: float) -> int:
        """Bytes that the cache takes of what is free; ``ratio`` of 1 or more is a count."""
        if self._rule.objects:
            return int(max(0, free) * ratio)
        return self.blocks(free, ratio) * self.shape.block_bytes

    def blocks(self, free: int, ratio: float) -> int:
        """Blocks, or sessions, of the cache.

        Sessions are taken one by one as requests come: as many as the batch has, no more than
        the entries.
        """
        if self._rule.of == "slots":
            entries = int(ratio) if ratio >= 1 else int(self._rule.default)
            return min(entries, self._batch)
        if ratio >= 1:
            return int(ratio)
        base = self._total if self._rule.of == "total" else max(0, free)
        return int(base * ratio) // self.shape.block_bytes

    def tokens(self, region: int) -> int:
        """Tokens that a region holds."""
        if self._rule.objects:
            return tokens_held(region, self.shape, self._constants)
        return region // self.shape.block_bytes * self.shape.block_tokens


def _token_bytes(text: TextDims, settings: Settings, rule: CacheRule) -> int:
    """Bytes of one token's keys and values on one rank."""
    bits = rule.bits.get(settings.quant_policy, 16)
    extra = 4 if bits < 16 and rule.online_scales else 0
    heads = kv_heads_held(text.kv_heads, settings.tp) // settings.tp
    return text.layers * heads * 2 * (bits * text.head_dim // 8 + extra)
