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
from turbofit.memory.kv_cache import CacheShape, LoggedSlab
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


class SlabShape(CacheShape):
    """A region of pages, slabs of whole pages, blocks in slabs.

    ``states``: what each of up to ``sequences`` of a hybrid model takes of the region besides, from
    slabs of their own. The longest sequence has ``longest`` tokens.
    """

    slab_bytes: int
    sequences: int
    longest: int
    states: tuple[StatePart, ...] = ()

    @property
    def blocks_per_slab(self) -> int:
        return self.slab_bytes // self.block_bytes

    @property
    def state_bytes(self) -> int:
        """A sequence's state; 0 where every layer has attention."""
        return sum(part.count * part.object_bytes for part in self.states)

    def tokens(self, region: int) -> int:
        """Tokens that a plan counts on.

        A hybrid model has them beside the states of a full batch; where that is less than one whole
        context, what one request has alone, since the engine then runs fewer at once.
        """
        whole = self.tokens_beside(region, self.sequences)
        return max(whole, min(self.tokens_beside(region, 1), self.longest))

    def tokens_beside(self, region: int, sequences: int) -> int:
        """Tokens that a region holds, at least, beside the states of so many sequences.

        The first page starts at the next page boundary of the address the driver gives, so up to
        one page is lost; all of it is charged: under by at most one slab's tokens.
        """
        pages = max(0, region - self.page) // self.page
        for part in self.states:
            slabs = -(-sequences * part.count // part.per_slab)
            pages -= slabs * (part.slab_bytes // self.page)
        # A log's line that others wrote into may say anything: a slab has a page at least.
        slabs = max(0, pages) // max(1, self.slab_bytes // self.page)
        return slabs * self.blocks_per_slab * self.block_tokens


def block_bytes(text: TextDims, settings: Settings) -> int:
    """Bytes per rank of one KV block. Quantised KV adds a 16-bit scale and zero per head."""
    bits = settings.quant_policy or 16
    extra = 4 if bits < 16 else 0
    per_head = bits * text.head_dim // 8 + extra
    heads = kv_heads_held(text.kv_heads, settings.tp) // settings.tp
    # Latents are keys and values in one.
    kinds = 1 if text.mla else 2
    return text.attention_layers * heads * kinds * settings.cache_block_seq_len * per_head


def cache_shape(text: TextDims, settings: Settings, constants: EngineConstants) -> SlabShape:
    """How LMDeploy cuts a region for this model."""
    block = block_bytes(text, settings)
    slabs = LoggedSlab(_slab_bytes(block, constants), block)
    return shape_of(slabs, tuple(_states(text, settings, constants)), settings, constants)


def shape_of(
    blocks: LoggedSlab,
    states: tuple[StatePart, ...],
    settings: Settings,
    constants: EngineConstants,
) -> SlabShape:
    """A region with these slabs of blocks, and of states."""
    return SlabShape(
        block_bytes=blocks.object_bytes,
        block_tokens=settings.cache_block_seq_len,
        step=constants.pool_granularity,
        page=constants.page_size,
        slab_bytes=blocks.slab_bytes,
        sequences=settings.max_batch_size,
        longest=settings.session_len,
        states=states,
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
