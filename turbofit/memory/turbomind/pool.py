"""Bytes of TurboMind's pool in the largest stage of a forward, and of the permanent buffers.

TurboMind's executor allocates every activation from a private pool, which never returns memory. The
largest sum of live tensors therefore counts. Each method of `PoolModel` adds up one stage, in
bytes, as the sources `unified_decoder`, `unified_attention_layer`, `generation`, `internvit` and
`qwenvit` allocate and free. `device_buffers` and `pinned_buffers` have the permanent buffers
outside the pool. All figures were compared with the 0.18 binary on pretend GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from turbofit.core.images import ImageRule
from turbofit.core.model import DeltaDims, Model, TextDims, VisionDims
from turbofit.core.plan import Settings
from turbofit.core.units import FLOAT, HALF, INT, round_up
from turbofit.memory.account import PAGE, Forward, VisionLoad
from turbofit.memory.turbomind.weights import (
    DeltaKernel,
    EngineConstants,
    expert_width,
    ffn_width,
    kv_heads_held,
    lm_head_rows,
    vision_mlp_width,
    vision_tp,
)

#: Bytes of ids, offsets and masks of a pass, and of a stage's small allocations: an upper bound.
_BOOKKEEPING = 64 << 10
#: Bytes of one row's offsets, positions, masks and top-k scratch: far above the need of most rows.
_ROW = 4096
#: Models with an experts' activation that no kernel fuses into the products (``kSiluGptOss``).
_UNFUSED = frozenset({"GptOssForCausalLM"})

#: Bytes of a tensor map, which describes to a kernel the tensor that the kernel copies.
_TENSOR_MAP = 128
#: The most tensor maps of a sequence, and of each head of a sequence.
_SEQUENCE_MAPS = 16
_HEAD_MAPS = 4
#: Bytes of one element of a segment's state: 4 bytes, plus two 2-byte fields or one 4-byte field.
_SEGMENT_BYTES = 8
POINTER = 8
CURAND_STATE = 48
_ROUTING_TILES = 16
_WORDS = 2 * 2 * 32 + 48  # stop and bad words (32 ids and offsets each), end ids, penalties


class PoolModel:
    """The memory of each stage of a forward, for one model with given settings."""

    def __init__(
        self,
        model: Model,
        settings: Settings,
        constants: EngineConstants,
        capability: tuple[int, int] = (8, 0),
    ) -> None:
        text, tp = model.text, settings.tp
        self.model = model
        self.text = text
        self.tp = tp
        self.constants = constants
        self.forward_tokens = forward_tokens(settings)
        self.vocab_padded = lm_head_rows(text, tp)
        #: On one rank: attention heads, KV heads, and the MLP's channels.
        self.local_heads = text.heads // tp
        self.local_kv = kv_heads_held(text.kv_heads, tp) // tp
        self.ffn = ffn_width(text.intermediate, tp, model.quantization, constants) // tp
        #: Bytes of the symmetric buffer.
        self.symm = symmetric_buffer(text, settings)
        quantization = model.quantization
        packed = constants.packed_format(quantization, capability) if quantization else None
        #: Tensors of the MLP's width: gate and up, or only their product if a kernel fuses them.
        self.ffn_streams = 1 if packed and packed.fused_silu else 2
        #: Bytes of one element in the quantised input of a linear layer; 0 if inputs have 16 bits.
        self.input_bytes = packed.input if packed else 0.0
        #: The same for an expert.
        self.expert_streams = 1 if constants.expert_format(capability).fused_silu else 2
        if text.architecture in _UNFUSED:
            self.expert_streams = 2
        #: An expert's channels on one rank.
        self.expert = 0
        if text.moe is not None:
            inner = text.moe.intermediate
            self.expert = expert_width(inner, tp, quantization, constants, capability) // tp

    def peak(self, forward: Forward) -> int:
        """Return the pool's bytes in the largest stage of one forward."""
        stages = [self._decoder(forward), self._sampling(forward)]
        if forward.units and self.model.vision is not None:
            stages.append(self._vision(forward.units))
        return max(stages) + _BOOKKEEPING

    def _embeds(self, units: int) -> int:
        """Return the bytes of the image features, which live until the forward ends."""
        return self.model.features(units) * self.text.hidden * HALF

    def _decoder(self, forward: Forward) -> int:
        """Return the bytes of residual, image features and the decoder's largest stage.

        One GPU alone has no symmetric buffer. The hidden states, which are in that buffer on
        several GPUs, then count here.
        """
        text, tokens = self.text, forward.tokens
        streams = 2 if self.tp == 1 else 1
        base = tokens * text.hidden * HALF * streams + self._embeds(forward.units)
        stages = [self._attention(tokens, forward.context), self._mlp(forward)]
        if text.delta is not None:
            quantised = int(text.delta.values // self.tp * self.input_bytes)
            stages.append(tokens * (token_bytes(text.delta, self.tp) + quantised))
        return base + max(stages)

    def _attention(self, tokens: int, context: int) -> int:
        """Return the bytes of attention: tokens' QKV and output, and flattened keys and values.

        Flattened are the keys and values of all sequences in prefill. The engine frees the
        flattened tensors before the output is quantised. A latent contains keys and values.
        """
        size = self.text.head_dim * HALF
        kinds = 1 if self.text.mla else 2
        queries = self.local_heads * (2 if self.text.output_gate else 1)
        qkv = tokens * (queries + kinds * self.local_kv) * size
        out = tokens * self.local_heads * size
        flat = kinds * self.local_kv * (context + self.constants.kv_flatten_pad_tokens) * size
        return qkv + out + max(flat, int(out / HALF * self.input_bytes))

    def _mlp(self, forward: Forward) -> int:
        """Return the bytes of the layer with the largest MLP or experts.

        A dense layer has gate and up; if a kernel fuses gate and up, the layer has only the
        product. Experts need the router's scores, and for each routed token gate, up and the
        output. A shared expert, with an output of its own, runs while the outputs of the experts
        are alive. Dense layers precede layers with experts.
        """
        moe, tokens = self.text.moe, forward.tokens
        dense = tokens * self.ffn * self.ffn_streams * HALF
        if self.input_bytes and moe is None:
            # The input is quantised, and the fused product, too.
            dense = int(tokens * (self.text.hidden + self.ffn) * self.input_bytes)
        mixed = moe is not None and moe.layers < self.text.layers
        if moe is None or (mixed and forward.first_layer):
            return dense
        routed = tokens * moe.experts_per_token
        router = tokens * moe.experts * FLOAT
        chosen = routed * self.expert_streams * self.expert * HALF
        shared = 0
        if moe.shared_intermediate:
            inner = moe.shared_intermediate // self.tp
            shared = tokens * (2 * inner + self.text.hidden) * HALF
        experts = router + routed * self.text.hidden * HALF + max(chosen, shared)
        return max(dense if mixed else 0, experts)

    def _sampling(self, forward: Forward) -> int:
        """Return the bytes of sampling the forward's rows.

        The logits exist in 16 and 32 bits, or are sorted, which may take more. Of the forward's
        hidden states, only the sampled rows are then alive.
        """
        logits = forward.rows * self.vocab_padded
        row = self.text.hidden * HALF + _ROW
        base = forward.rows * row + self._embeds(forward.units)
        cast = logits * (HALF + FLOAT)
        sort = logits * (FLOAT + 4)
        if forward.top_k_0:
            sort += logits * (4 + 8)
        return base + max(cast, sort)

    def _vision(self, units: int) -> int:
        """Return the bytes of the vision tower for ``units`` tiles or patches."""
        vision = self.model.vision
        assert vision is not None
        tower = self._internvit if vision.kind == "internvit" else self._qwenvit
        return tower(vision, units)

    def _internvit(self, vision: VisionDims, tiles: int) -> int:
        """Return the bytes of InternVL's tower: on one GPU all tiles run at once.

        On several GPUs, the symmetric buffer limits the number of tiles that run at once.
        """
        text = self.text
        side = (vision.image_size or 0) // vision.patch_size  # patches along a tile's side
        sequence = side * side + 1  # tower tokens of a tile
        out_tokens = self.model.features(1)
        chunk = tiles  # that run at once
        if self.tp > 1:
            row = max(sequence * vision.hidden, out_tokens * text.hidden)
            chunk = min(tiles, max(1, self.symm // HALF // row))
        ranks = vision_tp(vision, self.tp)
        token = sequence * vision.hidden * HALF
        streams = 2 if self.tp == 1 else 1  # residual, and hidden if there is no symmetric buffer
        patch_in = vision.channels * vision.patch_size**2
        pixels = vision.channels * (side * vision.patch_size) ** 2 * HALF
        patches = side * side * (patch_in + vision.hidden) * HALF
        merged = out_tokens * vision.hidden * vision.merge**2 * HALF
        inner = out_tokens * text.hidden // self.tp * HALF
        # The stages of a tile: patch embedding, attention, MLP, projector.
        stage = max(
            pixels + patches + token,
            token * streams + token * 6 // ranks,
            token * streams + sequence * vision_mlp_width(vision, self.tp) // self.tp * HALF,
            token * streams
            + 2 * merged
            + inner
            + (out_tokens * text.hidden * HALF) * (streams - 1),
        )
        return chunk * stage + tiles * out_tokens * text.hidden * HALF

    def _qwenvit(self, vision: VisionDims, patches: int) -> int:
        """Return the bytes of Qwen's towers for all patches of a forward at once.

        The prefill size does not limit the number of patches. Four learnt positions for each patch
        are alive until the patches are embedded.
        """
        ranks = vision_tp(vision, self.tp)
        head_dim = self.constants.vision_head_dims.get(vision.head_dim, vision.head_dim)
        width = vision.heads * head_dim // ranks * HALF
        hidden = vision.hidden * HALF
        in_symm = self.tp > 1 and patches * hidden <= self.symm
        streams = 1 if in_symm else 2
        rotary = vision.head_dim * HALF
        mlp = vision_mlp_width(vision, self.tp) // self.tp * HALF * (2 if vision.gated_mlp else 1)
        # A layer: attention or MLP.
        stage = rotary + hidden * streams + max(6 * width, mlp)
        merged = vision.merge**2
        inner = vision.hidden * merged // self.tp * HALF
        out = self.text.hidden * HALF
        merger = rotary + hidden * streams + (inner + 2 * out) // merged
        if vision.kind != "qwen3vit":
            return patches * max(stage, merger)
        pixels = vision.channels * vision.temporal_patch * vision.patch_size**2 * HALF
        embedding = rotary + 4 * (hidden + HALF) + pixels + hidden
        return patches * max(embedding, stage, merger)


def forward_tokens(settings: Settings) -> int:
    """Return the most tokens of one forward: prefill plus batch, in whole multiples of ``tp``."""
    return round_up(settings.max_prefill_token_num + settings.max_batch_size, settings.tp)


def symmetric_buffer(text: TextDims, settings: Settings) -> int:
    """Return the bytes of the communicators' shared buffer; 0 at tp 1."""
    if settings.tp == 1:
        return 0
    hidden = forward_tokens(settings) * text.hidden * HALF
    logits = settings.max_batch_size * lm_head_rows(text, settings.tp) * HALF
    return max(hidden, logits)


def engine_bound(rule: ImageRule, vision_load: VisionLoad, settings: Settings) -> int:
    """Return the most vision units in one forward of TurboMind; an upper bound.

    The engine encodes an image whole in every forward that has at least one token of the image.
    Without prefix caching, three bounds hold at once. The first bound is the tokens of the forward:
    one token of the first image and one of the last are enough, other images need all tokens. The
    second bound is the summed length of the sequences in prefill, at most ``session_len``
    (TurboMind's ``max_context_token_num``). The third bound is the batch.

    With prefix caching, only the second and the third bound hold. A few tokens may then need whole
    images, for three reasons:

    - A second question about an image resumes at the edge of a block, mostly among the image's last
    tokens (rehearsed: 104 tiles for a hundred tokens).
    - While a request writes a block, requests with the same block are passed by newer ones, whose
    images are cut at the forward's end. In later forwards the passed requests come first, and their
    images are cut, too. So one forward may have the rests of many images, all of them new
    (rehearsed: 66 tiles instead of 42, with texts that begin alike).
    - An evicted request resumes inside an image that it shares with a request that still runs
    (rehearsed: two of them in one forward).

    So no bound follows from the images alone that were sent before (docs/turbomind.md).
    Source: lmdeploy 0.16.0 src/turbomind/engine/scheduler.cc::Scheduler
    """
    by_context = rule.units_within(settings.session_len)
    by_batch = settings.max_batch_size * vision_load.units_per_request
    bound = by_context
    if not settings.enable_prefix_caching:
        inside = max(0, forward_tokens(settings) - 2)
        bound = min(bound, rule.units_within(inside) + 2 * vision_load.units_per_image)
    return min(max(vision_load.units_per_image, bound), by_batch)


# Gated delta nets: activations of a forward, and the workspace of its kernels.
#
# The kernels for Hopper and for consumer Blackwell need a workspace for the prompts of a forward. A
# pool of the engine's thread has the workspace, once for each phase. Kernels for cards before
# Hopper need no workspace. Long sequences are cut into segments that run side by side, each with a
# state. Source: the plan.cc of each architecture, and
# lmdeploy 0.16.0 src/turbomind/models/llama/GatedDeltaNetLayer.cc::Forward


def token_bytes(delta: DeltaDims, tp: int) -> int:
    """Return the bytes of one token in a delta net, without the residual stream.

    The bytes are those of the input projections, of two gates in 32 bits, of the output, and of the
    convolution's output.
    """
    inputs = delta.channels + delta.values + 2 * delta.value_heads
    sixteen = inputs + delta.values + delta.channels
    return (sixteen * HALF + 2 * delta.value_heads * FLOAT) // tp


def workspace(
    delta: DeltaDims, settings: Settings, kernel: DeltaKernel, sm_count: int, tokens: int
) -> int:
    """Return the workspace bytes for one prompt of ``tokens`` tokens, as in LMDeploy's warm-up."""
    if not kernel.chunk or not tokens:
        return 0
    heads = delta.value_heads // settings.tp
    chunks = -(-tokens // kernel.chunk)
    segments = 0
    if heads <= kernel.most_heads(chunks):
        segments = -(-chunks // kernel.segment_chunks(heads, chunks, sm_count))
    return _tensors(delta, heads, kernel, tokens, segments) + _maps(heads, 1)


def meeting_workspace(
    delta: DeltaDims, settings: Settings, kernel: DeltaKernel, sm_count: int, tokens: int
) -> int:
    """Return the most workspace bytes of a forward with ``tokens`` tokens of any number of prompts.

    The figure is an upper bound.
    """
    if not kernel.chunk:
        return 0
    heads, batch = delta.value_heads // settings.tp, settings.max_batch_size
    segments = _most_segments(kernel, heads, sm_count, tokens, batch)
    maps = _maps(heads, batch) + delta.layers * batch * _TENSOR_MAP
    return _tensors(delta, heads, kernel, tokens, segments) + maps


def _tensors(delta: DeltaDims, heads: int, kernel: DeltaKernel, tokens: int, segments: int) -> int:
    """Return the bytes of the workspace's tensors.

    The tensors are the summed decays in 32 bits, each chunk's inverse matrix, and the segments'
    states.
    """
    whole = tokens * (round_up(heads, 4) * FLOAT + heads * kernel.chunk * HALF)
    return whole + segments * heads * delta.key_dim * delta.value_dim * _SEGMENT_BYTES


def _maps(heads: int, sequences: int) -> int:
    """Return the most bytes of tensor maps for a number of sequences."""
    return sequences * (_SEQUENCE_MAPS + _HEAD_MAPS * heads) * _TENSOR_MAP


@lru_cache(maxsize=4096)
def _most_segments(
    kernel: DeltaKernel, heads: int, sm_count: int, tokens: int, sequences: int
) -> int:
    """Return the most segments that a forward's sequences can be cut into.

    The worst case is one long sequence with the most short sequences that still let the kernel cut.
    A short sequence has one chunk of two tokens, or more chunks if the batch allows only a few
    sequences.
    """
    most = 0
    for longest in range(1, -(-tokens // kernel.chunk) + 1):
        limit = kernel.most_heads(longest)
        if heads > limit:
            continue
        # The longest sequence has one token in its last chunk; each chunk of the others has two.
        left = tokens - (longest - 1) * kernel.chunk - 1
        others = min(longest * (limit - heads) // heads, left // 2)
        segment = kernel.segment_chunks(heads, longest, sm_count)
        short = min(others, sequences - 1)
        most = max(most, -(-longest // segment) + short + (others - short) // segment)
    return most


# Device and host buffers that live as long as the engine, allocated after the cache.
#
# Each line is a buffer of one constructor in LMDeploy (language_model, unified_attention_layer,
# generation, sampling, guided_decoding, moe_ffn_layer, gemm workspace), in bytes per rank.


def device_buffers(
    model: Model, settings: Settings, constants: EngineConstants, l2: int
) -> Iterator[tuple[str, int, str]]:
    """Yield the persistent device buffers of one rank: (term, bytes, note).

    The GEMM tuner flushes the card's L2 cache through a buffer of ``l2`` bytes, the cache's size.
    """
    text, batch = model.text, settings.max_batch_size
    phases, forward = phases_of(settings), forward_tokens(settings)
    heads = text.heads // settings.tp
    tokens = constants.attention_workspace_tokens
    yield (
        "attention_workspace",
        tokens * heads * (text.head_dim + 2) * INT + tokens * INT,
        "split-k partial outputs of decoding",
    )
    yield (
        "block_pointers",
        phases * (_block_slots(settings) + 16) * POINTER,
        "max_batch_size × session_len / cache_block_seq_len pointers",
    )
    yield "token_ids", batch * settings.session_len * INT, "max_batch_size × session_len"
    yield (
        "sampling_buffers",
        phases * batch * constants.max_log_probs * (INT + INT),
        "log probabilities and their indices",
    )
    bitmask = -(-lm_head_rows(text, settings.tp) // 32) * INT
    yield "guided_decoding", phases * batch * bitmask, "one bit a vocabulary entry and row"
    if settings.tp > 1:
        yield (
            "symmetric_buffer",
            round_up(symmetric_buffer(text, settings), PAGE),
            "all-reduce buffer; also holds the hidden states",
        )
    if constants.gemm_workspace:
        yield "gemm_workspace", sum(constants.gemm_workspace), "barriers, partials, tensor maps"
    yield "l2_flush", l2, "the GEMM tuner's cache flush, never freed"
    if text.moe is not None:
        # MoeFfnDefaultImpl::Init: masks of experts, arrays of routed tokens, counters.
        moe = text.moe
        routed = (moe.experts + 4 * moe.experts_per_token) * forward
        size = (routed + moe.experts * (_ROUTING_TILES + 1) + 1) * INT
        yield "expert_routing", size, "which token goes to which expert"
    small = batch * (CURAND_STATE + phases * (6 * INT + POINTER + _WORDS * INT))
    small += forward * (1 + phases * 2 * INT)
    if text.delta is not None:
        small += phases * batch * (text.delta.layers + 1) * POINTER  # a sequence's states
    if model.mrope:
        small += phases * forward * 3 * INT  # M-RoPE positions
    yield "small_buffers", small, "token ids, lengths, stop words, masks, positions"


def pinned_buffers(model: Model, settings: Settings) -> int:
    """Return the pinned host bytes of one rank, allocated at the start."""
    batch = settings.max_batch_size
    embeds = phases_of(settings) * forward_tokens(settings) * model.text.hidden * 2
    token_ids = batch * settings.session_len * INT
    logprobs = batch * 1024 * (INT + INT)
    pointers = _block_slots(settings) * POINTER
    bitmask = batch * -(-lm_head_rows(model.text, settings.tp) // 32) * INT
    small = batch * (CURAND_STATE + _WORDS * INT) + forward_tokens(settings) * 2 * INT
    return embeds + token_ids + logprobs + pointers + bitmask + small


def phases_of(settings: Settings) -> int:
    """Return the number of copies of a step's buffers: 2 while ``async_`` is on, 1 without."""
    return 2 if settings.async_ else 1


def _block_slots(settings: Settings) -> int:
    return settings.max_batch_size * -(-settings.session_len // settings.cache_block_seq_len)
