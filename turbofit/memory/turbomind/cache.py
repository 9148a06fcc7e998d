"""The KV cache: from free memory to a region, to pages, to slabs, to tokens.

TurboMind since 0.15 takes one region of ``ratio × min(free over the tp group)`` and serves objects
from it, those of one size from slabs of their own: a KV block of ``cache_block_seq_len`` tokens
over all layers with attention, and of a hybrid model the state of each sequence that runs.
Source: lmdeploy 0.16.0 src/turbomind/memory/page.h::PageAllocator
lmdeploy 0.16.0 src/turbomind/kernels/attention/block.h `block_len`
"""

from __future__ import annotations

from collections.abc import Iterator

from turbofit.core.model import TextDims
from turbofit.core.plan import Settings
from turbofit.core.struct import Struct
from turbofit.core.units import HALF
from turbofit.memory.turbomind.weights import EngineConstants, kv_heads_held


class StatePart(Struct):
    """Objects of one size of a sequence's state: ``count`` of them a sequence, in slabs."""

    count: int
    object_bytes: int
    slab_bytes: int

    @property
    def per_slab(self) -> int:
        """Objects that a slab holds."""
        return self.slab_bytes // self.object_bytes


class CacheShape(Struct):
    """How one rank's region is cut; bytes per rank, ``block_tokens`` tokens in one block.

    ``states``: what each sequence of a hybrid model takes of the region besides, from slabs of
    their own.
    """

    block_bytes: int
    block_tokens: int
    slab_bytes: int
    blocks_per_slab: int
    states: tuple[StatePart, ...] = ()

    @property
    def state_bytes(self) -> int:
        """A sequence's state; 0 where every layer has attention."""
        return sum(part.count * part.object_bytes for part in self.states)


def block_bytes(text: TextDims, settings: Settings) -> int:
    """Bytes per rank of one KV block. Quantised KV adds a 16-bit scale and zero per head."""
    bits = settings.quant_policy or 16
    extra = 4 if bits < 16 else 0
    per_head = bits * text.head_dim // 8 + extra
    heads = kv_heads_held(text.kv_heads, settings.tp) // settings.tp
    # Latents are keys and values in one.
    kinds = 1 if text.mla else 2
    return text.attention_layers * heads * kinds * settings.cache_block_seq_len * per_head


def cache_shape(text: TextDims, settings: Settings, constants: EngineConstants) -> CacheShape:
    """How LMDeploy cuts a region for this model."""
    block = block_bytes(text, settings)
    slab = _slab_bytes(block, constants)
    return CacheShape(
        block_bytes=block,
        block_tokens=settings.cache_block_seq_len,
        slab_bytes=slab,
        blocks_per_slab=slab // block,
        states=tuple(_states(text, settings, constants)),
    )


def _slab_bytes(size: int, constants: EngineConstants) -> int:
    """The slab that LMDeploy chooses: doubled until it wastes at most 5 % or reaches 1 GiB.

    Source: lmdeploy 0.16.0 src/turbomind/memory/slab.h::SlabAllocator
    """
    slab = constants.page_size
    while slab < size:
        slab *= 2
    while slab // size * size < constants.slab_fill * slab and slab < constants.slab_limit:
        slab *= 2
    return slab


def _states(text: TextDims, settings: Settings, constants: EngineConstants) -> Iterator[StatePart]:
    """A sequence's delta nets: the convolutions' inputs of all layers, and a layer's state each.

    Both at 16 bits. lmdeploy 0.16.0 src/turbomind/models/llama/GatedDeltaNetLayer.cc::Setup
    """
    delta = text.delta
    if delta is None:
        return
    inputs = delta.layers * delta.channels // settings.tp * delta.kernel * HALF
    state = delta.value_heads // settings.tp * delta.key_dim * delta.value_dim * HALF
    for size, count in ((inputs, 1), (state, delta.layers)):
        yield StatePart(count=count, object_bytes=size, slab_bytes=_slab_bytes(size, constants))


def tokens_held(
    region: int, shape: CacheShape, constants: EngineConstants, sequences: int = 1
) -> int:
    """Tokens that a region holds, at least, beside the states of so many sequences.

    The first page starts at the next page boundary of the address the driver gives, so up to one
    page is lost; all of it is charged: under by at most one slab's tokens.
    """
    pages = max(0, region - constants.page_size) // constants.page_size
    for part in shape.states:
        slabs = -(-sequences * part.count // part.per_slab)
        pages -= slabs * (part.slab_bytes // constants.page_size)
    slabs = max(0, pages) // (shape.slab_bytes // constants.page_size)
    return slabs * shape.blocks_per_slab * shape.block_tokens


def tokens_planned(
    region: int, shape: CacheShape, constants: EngineConstants, settings: Settings
) -> int:
    """Tokens that a plan counts on.

    Of a hybrid model beside the states of a full batch; where that is less than one whole context,
    what one request has alone, since the engine then runs fewer at once.
    """
    whole = tokens_held(region, shape, constants, settings.max_batch_size)
    return max(whole, min(tokens_held(region, shape, constants), settings.session_len))
