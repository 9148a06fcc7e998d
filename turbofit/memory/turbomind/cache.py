"""The KV cache: from free memory to a region, to pages, to slabs, to tokens.

TurboMind since 0.15 takes one region of ``ratio × min(free over the tp group)`` and serves objects
of one size from it: a KV block of ``cache_block_seq_len`` tokens over all layers.
Source: LMDeploy's src/turbomind/memory (pages, slabs) and kernels/attention/block.h (layout).
"""

from __future__ import annotations

from turbofit.core.model import TextDims
from turbofit.core.plan import Settings
from turbofit.core.struct import Struct
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.memory.turbomind.weights import kv_heads_held

__all__ = ["CacheShape", "block_bytes", "cache_shape", "region_bytes", "tokens_held"]


class CacheShape(Struct):
    """How one rank's region is cut; bytes per rank, ``block_tokens`` tokens in one block."""

    block_bytes: int
    block_tokens: int
    slab_bytes: int
    blocks_per_slab: int


def block_bytes(text: TextDims, settings: Settings) -> int:
    """Bytes per rank of one KV block. Quantised KV adds a 16-bit scale and zero per head."""
    bits = settings.quant_policy or 16
    extra = 4 if bits < 16 else 0
    per_head = bits * text.head_dim // 8 + extra
    heads = kv_heads_held(text.kv_heads, settings.tp) // settings.tp
    # Latents are keys and values in one.
    kinds = 1 if text.mla else 2
    return text.layers * heads * kinds * settings.cache_block_seq_len * per_head


def cache_shape(text: TextDims, settings: Settings, constants: EngineConstants) -> CacheShape:
    """The slab that LMDeploy chooses: doubled until it wastes at most 5 % or reaches 1 GiB."""
    block = block_bytes(text, settings)
    slab = constants.page_size
    while slab < block:
        slab *= 2
    while slab // block * block < constants.slab_fill * slab and slab < constants.slab_limit:
        slab *= 2
    return CacheShape(
        block_bytes=block,
        block_tokens=settings.cache_block_seq_len,
        slab_bytes=slab,
        blocks_per_slab=slab // block,
    )


def region_bytes(free: int, ratio: float) -> int:
    """The region that ``ratio`` of ``free`` gives, as the engine rounds it."""
    return int(free * ratio)


def tokens_held(region: int, shape: CacheShape, constants: EngineConstants) -> int:
    """Tokens that a region holds, at least.

    The first page starts at the next page boundary of the address the driver gives, so up to one
    page is lost; all of it is charged: under by at most one slab's tokens.
    """
    pages = max(0, region - constants.page_size) // constants.page_size
    slabs = pages // (shape.slab_bytes // constants.page_size)
    return slabs * shape.blocks_per_slab * shape.block_tokens
