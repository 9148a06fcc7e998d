"""The KV cache: free memory becomes a region, then pages, slabs and tokens.

Since 0.15 TurboMind takes one region of ``ratio × min(free over the tp group)`` bytes. Objects are
allocated in the region; objects of equal size share slabs. A KV block is an object: it has
``cache_block_seq_len`` tokens over all layers with attention. In a hybrid model, the state of each
running sequence consists of objects, too.
Source: lmdeploy 0.16.0 src/turbomind/memory/page.h::PageAllocator
lmdeploy 0.16.0 src/turbomind/kernels/attention/block.h `block_len`
"""

from __future__ import annotations

from collections.abc import Iterator

from turbofit.core.model import TextDims
from turbofit.core.plan import Settings
from turbofit.core.struct import Struct
from turbofit.core.units import HALF
from turbofit.memory.account import CacheShape, LoggedSlab
from turbofit.memory.turbomind.weights import EngineConstants, kv_heads_held


class StatePart(Struct):
    """The objects of one size in a sequence's state.

    Each sequence has ``count`` objects of ``object_bytes``; a slab has ``slab_bytes``.
    """

    count: int
    object_bytes: int
    slab_bytes: int

    @property
    def per_slab(self) -> int:
        return self.slab_bytes // self.object_bytes


class SlabShape(CacheShape):
    """The layout of TurboMind's cache: a region of pages, slabs of whole pages, blocks in slabs.

    ``states`` are the parts of one sequence's state in a hybrid model; each part has slabs of its
    own in the region. ``sequences`` is the most sequences that run at once. ``longest`` is the
    number of tokens in the longest sequence.
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
        """The bytes of one sequence's state; 0 if every layer has attention."""
        return sum(part.count * part.object_bytes for part in self.states)

    def tokens(self, region: int) -> int:
        """Return the KV tokens in a region of ``region`` bytes, as a plan counts them.

        In a hybrid model, the states of a full batch are subtracted first. If less than one whole
        context is left, only one sequence's state is subtracted: the engine then runs fewer
        requests at once.
        """
        whole = self.tokens_beside(region, self.sequences)
        return max(whole, min(self.tokens_beside(region, 1), self.longest))

    def tokens_beside(self, region: int, sequences: int) -> int:
        """Return the least KV tokens in a region that also holds the states of some sequences.

        ``region`` is in bytes, ``sequences`` the number of sequences. At most one page at the
        region's start is unusable. A whole page is always subtracted; the number may therefore be
        too low by one slab's tokens.
        """
        pages = max(0, region - self.page) // self.page
        for part in self.states:
            slabs = -(-sequences * part.count // part.per_slab)
            pages -= slabs * (part.slab_bytes // self.page)
        # A slab counts as one page at least: other output may garble the log line of a slab.
        slabs = max(0, pages) // max(1, self.slab_bytes // self.page)
        return slabs * self.blocks_per_slab * self.block_tokens


def block_bytes(text: TextDims, settings: Settings) -> int:
    """Return one KV block's bytes per rank.

    Quantised keys and values also have a 16-bit scale and zero point for each head and token.
    """
    bits = settings.quant_policy or 16
    extra = 4 if bits < 16 else 0
    per_head = bits * text.head_dim // 8 + extra
    heads = kv_heads_held(text.kv_heads, settings.tp) // settings.tp
    # A latent contains keys and values.
    kinds = 1 if text.mla else 2
    return text.attention_layers * heads * kinds * settings.cache_block_seq_len * per_head


def cache_shape(text: TextDims, settings: Settings, constants: EngineConstants) -> SlabShape:
    """Return the layout that LMDeploy chooses for this model."""
    block = block_bytes(text, settings)
    slabs = LoggedSlab(_slab_bytes(block, constants), block)
    return shape_of(slabs, tuple(_states(text, settings, constants)), settings, constants)


def shape_of(
    blocks: LoggedSlab,
    states: tuple[StatePart, ...],
    settings: Settings,
    constants: EngineConstants,
) -> SlabShape:
    """Return the layout with given slabs of blocks, and given parts of states."""
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
    """Return the bytes of a slab for objects of ``size`` bytes.

    LMDeploy doubles the slab until at most 5 % of the slab is wasted, or until the slab has 1 GiB.
    Source: lmdeploy 0.16.0 src/turbomind/memory/slab.h::SlabAllocator
    """
    slab = constants.page_size
    while slab < size:
        slab *= 2
    while slab // size * size < constants.slab_fill * slab and slab < constants.slab_limit:
        slab *= 2
    return slab


def _states(text: TextDims, settings: Settings, constants: EngineConstants) -> Iterator[StatePart]:
    """Yield the parts of a sequence's state in delta nets.

    The first part is one object with the inputs of all layers' convolutions. The second part has
    one object for each layer. All values have 16 bits.
    lmdeploy 0.16.0 src/turbomind/models/llama/GatedDeltaNetLayer.cc::Setup
    """
    delta = text.delta
    if delta is None:
        return
    inputs = delta.layers * delta.channels // settings.tp * delta.kernel * HALF
    state = delta.value_heads // settings.tp * delta.key_dim * delta.value_dim * HALF
    for size, count in ((inputs, 1), (state, delta.layers)):
        yield StatePart(count=count, object_bytes=size, slab_bytes=_slab_bytes(size, constants))
