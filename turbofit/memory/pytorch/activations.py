"""What one forward of the PyTorch engine holds at once, by torch's own allocator.

The engine runs the model's code eagerly for every prefill, so that what counts is the largest sum
of tensors alive at one moment: in an MLP, attention or delta net, of the decoder or the tower.
Factors are counted in LMDeploy's modelling files and checked on pretend GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

from turbofit.core.model import MlaDims, Model, MoeDims
from turbofit.core.plan import Settings
from turbofit.core.struct import Struct
from turbofit.core.units import HALF
from turbofit.memory.pytorch.cache import TURBO_QUANT, WIDE_BLOCK
from turbofit.memory.pytorch.weights import (
    WHOLE_TOWERS,
    PytorchConstants,
    expert_channels,
    kv_heads_held,
)

#: Hidden states where features of a depth are added: embeddings, hidden, residual, the scattered
#: features, their mask, and torch's running count of it in 64 bits.
#: Source: lmdeploy models/qwen3_vl.py::Qwen3VLTextModel._deepstack_process #79a63f
_DEEPSTACK_COPIES = 9
#: Hidden states more where text and image tokens go through layers of their own: those gathered for
#: one of them, and the output of both. lmdeploy models/cogvlm.py::VisionExpertMLP.forward #feb7fa
_EXPERT_COPIES = 2
#: What a gate adds to attention, in queries' channels: the gate as projected, laid out anew and
#: through its sigmoid, the normed queries, and the product. Over.
#: Source: lmdeploy pytorch/models/qwen3_5.py::Qwen3_5Attention.forward #2f2417
_GATED = 5
#: Pixels are sent at 32 bits: seen of a next forward's on pretend GPUs, exact for Qwen2-VL.
_AS_SENT = 2
_LLAMA4 = "Llama4ForCausalLM"
_PHI_MOE = "PhiMoEForCausalLM"
#: Whose delta nets project queries, keys, values and z as one.
#: Source: lmdeploy pytorch/models/qwen3_next.py::Qwen3NextGatedDeltaNet.__init__ #50eb1f
_NEXT = "Qwen3NextForCausalLM"
#: gpt-oss's activation as torch runs it where it does not compile it: products of the experts'
#: width more than a fused one leaves. Over where it does.
#: Source: lmdeploy pytorch/models/gpt_oss.py::GateupAct._impl #3cf648
_GPT_OSS = "GptOssForCausalLM"
_UNFUSED = 3
#: Copies of queries and keys around Llama 4's rotation. Over.
#: Source: lmdeploy models/llama4.py::Llama4TextAttention.forward #f6045e
_TURNED = 3
#: What TurboQuant adds to attention, in queries' channels: queries rotated, and for the output's
#: rotation its copy at 32 bits, the product at 32, and the result. Counted without the package
#: fast_hadamard_transform; over with it. lmdeploy turbo_quant.py::hadamard_rotate #5d1844
_ROTATED = 6
#: Fewer rows than these torch sorts in one go, with more memory each. Source: torch 2.12's Sort.cu.
_SEGMENTED_SORT = 128
#: Parts of the keys and values of which a decode step's attention keeps an output each, at 32
#: bits; few rows have more, of less memory.
#: Source: lmdeploy kernels/cuda/pagedattention.py::_get_split_k #4a7bcf
_SPLITS = 4
#: MoonViT's rotary tables: a complex number for each pair of a head's channels, for so many patches
#: of each side.
#: Source: lmdeploy kimi_k25_vision.py::Rope2DPosEmbRepeated._precompute_freqs_cis #534474
_MOONVIT = "moonvit"
_TABLE_SIDE, _COMPLEX = 512, 8
#: What making them takes at once, in tables: frequencies, numbers and their stack. Over.
_TABLES_MADE = 3
#: Hidden states of a patch in its attention, which turns queries and keys at 32 bits.
_TURNED_WIDE = 15
#: Tokens of a chunk of the gated delta rule. Source: fla/ops/gated_delta_rule/chunk.py.
_CHUNK = 64

#: Of each head: queries as projected, then queries, keys and padded values laid out, the output.
_LAID_OUT = 5
#: Hidden states of a token in attention: the scaled embeddings, what the layer before gave and its
#: residual, and their norm.
_COPIES = 4
#: The same beside the logits: from the last norm, and scaled.
_HEAD_COPIES = 2


def routed_elements(moe: MoeDims, expert: int, hidden: int) -> int:
    """Elements of a token among a layer's experts, of which a rank has so many channels each.

    Gate and up, their product, and the output of each chosen expert are alive together; logits of
    all experts and their softmax in 32 bits. lmdeploy cuda/moe/fused_moe.py::fused_moe #533a6a
    """
    return moe.experts_per_token * (3 * expert + hidden) + 3 * moe.experts


class Prefill(Struct):
    """One prefill: ``tokens`` of ``sequences``, the ``context`` that they see, vision ``units``.

    The engine sends the pixels of ``next_units`` to the card meanwhile, for the next forward.
    """

    tokens: int
    context: int
    units: int = 0
    sequences: int = 1
    next_units: int = 0


class Activations:
    """The stages of one model under one set of settings."""

    def __init__(self, model: Model, settings: Settings, constants: PytorchConstants) -> None:
        self.model = model
        self.text = model.text
        self.settings = settings
        self.constants = constants
        self.tp = settings.tp
        self.expert = expert_channels(model, self.tp)

    def graph_buffers(self, captured: Sequence[int]) -> int:  # noqa: ARG002 - MiniCPM3's
        """Bytes that the CUDA graphs of these batches hold beside their tables and one pool."""
        return 0

    def further_pool(self) -> int:
        """Bytes that torch keeps after the warm-up beside the pool of one step.

        Phi-3.5-MoE's router has a page for its small tensors. Seen on pretend GPUs.
        """
        return self.constants.page if self.text.architecture == _PHI_MOE else 0

    def prefill(self, forward: Prefill) -> int:
        """The largest stage of a prefill, in bytes."""
        tower = self._vision(forward) if forward.units and self.model.vision is not None else 0
        return max(self._decoder(forward), tower)

    def tables(self) -> int:
        """Bytes that the first image leaves for good: the tower's rotary tables."""
        vision = self.model.vision
        if vision is None or vision.kind != _MOONVIT:
            return 0
        return _TABLE_SIDE**2 * vision.head_dim // 2 * _COMPLEX

    def sampling(self, rows: int) -> int:
        """Logits of so many rows, or of fewer, and what sampling them takes."""
        few = min(rows, _SEGMENTED_SORT - 1) * self.constants.logit_few
        many = rows * self.constants.logit if rows >= _SEGMENTED_SORT else 0
        return max(few, many) * self.text.vocab + self.constants.sampling_base

    def decode(self, rows: int) -> int:
        """One decoding step of so many rows."""
        mlp = max(self._mlp_elements(), self._moe_elements() + self._unfused_elements())
        return rows * max(mlp, self._decode_attention(), self._delta_elements()) * HALF

    def _decode_attention(self) -> int:
        """Elements of a row in a decoding step's attention, with its parts' outputs."""
        per_head = _SPLITS * 2 * (self.text.head_dim + 2)
        if (mla := self.text.cached_latent) is not None:
            return self._latent_elements(mla, per_head)
        return self._attention_elements() + int(self.text.heads / self.tp * per_head)

    def delta_warmup(self, rows: int) -> int:
        """What delta nets add to the warm-up: a prefill of one token a row."""
        if self.text.delta is None:
            return 0
        one_each = Prefill(tokens=rows, context=rows, sequences=rows)
        return self._delta(one_each) + self.constants.kernel_tuning

    def _decoder(self, forward: Prefill) -> int:
        base = self._features(forward) + self.constants.prefill_base
        base += self.tables() if forward.units else 0
        base += self.constants.kernel_tuning if self.text.delta is not None else 0
        mlp, moe = forward.tokens * self._mlp_elements() * HALF, self._moe(forward.tokens)
        deep = 0
        if self._deepstack(forward.units):
            deep = forward.tokens * _DEEPSTACK_COPIES * self.text.hidden * HALF
        return base + max(mlp, moe, deep, self._attention(forward), self._delta(forward))

    def _moe(self, tokens: int) -> int:
        """A layer's experts; the first forwards of a size pick a variant of their kernels."""
        size, summed = tokens * self._moe_elements() * HALF, tokens * self.text.hidden * HALF
        if not size:
            return 0
        # The sum of the experts' outputs is made after the variant is picked. Of experts in 4 bits
        # there is one variant.
        packed = self.model.quantization is not None and self.model.quantization.of_experts
        tuning = 0 if self.text.delta is not None or packed else self.constants.kernel_tuning
        unfused = tokens * self._unfused_elements() * HALF
        return size + max(0, tuning - summed, unfused)

    def _unfused_elements(self) -> int:
        """Elements of a token that the experts' activation takes besides where it is not fused."""
        moe = self.text.moe
        if moe is None or self.text.architecture != _GPT_OSS:
            return 0
        return _UNFUSED * moe.experts_per_token * self.expert

    def _mlp_elements(self) -> int:
        """Elements of a token in a layer's MLP: gate and up, and the hidden states alive.

        A shared expert runs after those that are chosen, beside their sum.
        """
        text, constants = self.text, self.constants
        width, copies = 2 * text.intermediate / self.tp, constants.hidden_copies
        if text.moe is not None:
            dense = width if text.moe.layers < text.layers else 0.0
            shared = 2 * text.moe.shared_intermediate / self.tp
            width = max(dense, shared + 2 * text.hidden if shared else 0.0)
        if text.vision_experts:
            copies += _EXPERT_COPIES
        return int(width + copies * text.hidden + self._token_elements())

    def _token_elements(self) -> int:
        """Elements of a token beside its hidden states: rotary tables, positions and metadata.

        Fourier position encoding has two tables a KV head.
        Source: lmdeploy nn/rotary_embedding.py::FopeRotaryEmbedding.forward #55d2a5
        """
        text = self.text
        heads = max(1, text.kv_heads // self.tp) - 1 if text.fourier else 0
        return self.constants.token_elements + 2 * heads * text.head_dim

    def _moe_elements(self) -> int:
        """Elements of a token among a layer's experts, with the sum of their outputs; 0 without."""
        text, moe, constants = self.text, self.text.moe, self.constants
        if moe is None:
            return 0
        routed = routed_elements(moe, self.expert, text.hidden)
        if text.architecture == _LLAMA4:
            # Weighed inputs of the experts, and their output beside the shared expert's.
            routed += (moe.experts_per_token + 1) * text.hidden
        copies = constants.hidden_copies
        return int(routed + copies * text.hidden + self._token_elements())

    def _latent_elements(self, mla: MlaDims, more: int = 0) -> int:
        """Elements of a token in attention to latents, with so many more a head.

        Queries of the latent's and the position's channels, the latter turned too, the output in
        the latent's channels and then in the values'.
        Source: lmdeploy models/deepseek_v2.py `attn_output.new_empty(q_len, num_heads, `
        """
        text, constants = self.text, self.constants
        per_head = text.head_dim + mla.rope_dim + mla.kv_rank + mla.v_dim + more
        alive = (constants.hidden_copies - 1) * text.hidden + constants.token_elements
        return alive + text.heads // self.tp * per_head + text.head_dim + mla.kv_rank

    def _latent(self, mla: MlaDims, forward: Prefill) -> int:
        """Attention to latents: flattened ones are freed before the values' channels are made."""
        tokens = forward.tokens
        values = tokens * self.text.heads // self.tp * mla.v_dim
        flattened = (forward.context + 2 * WIDE_BLOCK) * self.text.head_dim
        return (tokens * self._latent_elements(mla) + max(0, flattened - values)) * HALF

    def _attention(self, forward: Prefill) -> int:
        """Projections and output of the tokens, and all keys and values they see, flattened."""
        if (mla := self.text.cached_latent) is not None:
            return self._latent(mla, forward)
        kv = kv_heads_held(self.text.kv_heads, self.tp) // self.tp * self.text.head_dim
        tokens = forward.tokens * self._attention_elements()
        return (tokens + 2 * kv * forward.context) * HALF

    def _attention_elements(self) -> int:
        """Elements of a token in a layer's attention, without keys and values of others."""
        text, constants = self.text, self.constants
        heads = text.heads * text.head_dim / self.tp
        kv = kv_heads_held(text.kv_heads, self.tp) // self.tp * text.head_dim
        # Hidden states alive as in the MLP, less its own two, and the projections before them.
        alive = (constants.hidden_copies - 1) * text.hidden + self._token_elements()
        extra = _GATED * heads if text.output_gate else 0
        if text.architecture == _LLAMA4:
            extra = _TURNED * (heads + kv)
        elif text.qk_norm and not text.output_gate:
            # Queries and keys that were normed lie beside those that were not.
            extra = heads + kv
        if self.settings.quant_policy == TURBO_QUANT:
            extra += _ROTATED * heads
        return int(alive + 2 * heads + 2 * kv + extra)

    def _delta(self, forward: Prefill) -> int:
        """The gated delta rule in chunks: a state for each chunk, and of each sequence before it.

        Counted in LMDeploy's and fla's sources, as if all tensors of a forward lived at once,
        chunk matrices had 32 bits as in older fla, and every sequence ended in a chunk of its own.
        On pretend GPUs (fla 0.6.0, Qwen3-Next) 8,192 tokens of one sequence held 1,161 MiB of
        1,230, and 6,000 of 375 sequences 2,341 of 2,444. Over.
        """
        delta = self.text.delta
        if delta is None:
            return 0
        heads = delta.value_heads // self.tp
        state = heads * delta.key_dim * delta.value_dim
        window = delta.channels // self.tp * 2 * delta.kernel
        # Of a sequence: the state read, the one left at 32 bits, a chunk's. The copy at 16 bits of
        # the one left is made when the chunks are gone.
        elements = forward.tokens * (self._delta_elements() + -(-state // _CHUNK))
        return (elements + min(forward.sequences, forward.tokens) * (4 * state + window)) * HALF

    def _delta_elements(self) -> int:
        """16-bit elements of a token in a delta net, without the states of its chunk; 0 without."""
        text, constants = self.text, self.constants
        delta = text.delta
        if delta is None:
            return 0
        heads = delta.value_heads // self.tp
        keys, values = heads * delta.key_dim, heads * delta.value_dim
        alive = (constants.hidden_copies - 1) * text.hidden + constants.token_elements
        # Before and after the convolution; keys repeated for each value head, and w; the gate z,
        # values laid out anew, u, the new values and the output; where one projection makes all of
        # them, what it made of z is alive beside its copy.
        wide = 2 * (delta.channels // self.tp) + 3 * keys + 5 * values
        if text.architecture == _NEXT:
            wide += values
        # Two gates, beta, the decay and its sum at 32 bits, three matrices of a chunk.
        return alive + wide + heads * (7 + 3 * _CHUNK)

    def _features(self, forward: Prefill) -> int:
        """Pixels and image features, alive until the forward ends."""
        units = forward.units
        if not units:
            return 0
        embeddings = self.model.features(units) * self.text.hidden * HALF
        pixels = _AS_SENT * self.model.pixel_bytes(units + forward.next_units)
        return pixels + embeddings + self._deepstack(units)

    def _deepstack(self, units: int) -> int:
        """Bytes that the tower hands to the first layers, alive until the forward ends."""
        layers = self.model.vision.deepstack if self.model.vision is not None else 0
        return layers * self.model.features(units) * self.text.hidden * HALF

    def _vision(self, forward: Prefill) -> int:
        """All images of the forward in one call of the tower, whatever their number."""
        vision, constants = self.model.vision, self.constants
        assert vision is not None
        copies = constants.vision_copies.get(vision.kind, constants.vision_copies["other"])
        mlp = 2 * vision.intermediate / (1 if vision.kind in WHOLE_TOWERS else self.tp)
        per_token = int(copies * vision.hidden + mlp + 2 * vision.head_dim)
        if vision.kind == _MOONVIT:
            per_token = max(per_token, _TURNED_WIDE * vision.hidden + 2 * vision.head_dim)
        tower = forward.units * self.model.unit_tower_tokens * per_token * HALF
        tower = max(tower, _TABLES_MADE * self.tables()) + self.tables()
        embeddings = forward.tokens * self.text.hidden * HALF
        pixels = self.model.pixel_bytes(forward.units + _AS_SENT * forward.next_units)
        given = embeddings + pixels + self._deepstack(forward.units)
        return tower + given + constants.vision_base


class MiniCPM3Activations(Activations):
    """Latents are expanded before they are cached, and a forward ends in the logits of all tokens.

    Checked on pretend GPUs.
    Source: lmdeploy pytorch/models/minicpm3.py::MiniCPM3ForCausalLM.forward #f412db
    """

    def prefill(self, forward: Prefill) -> int:
        """The largest stage, beside the logits of the forward before.

        Of a prompt in chunks these stay, held by a view of their last row. Over for the first.
        """
        logits = forward.tokens * self._head_elements() * HALF + self.constants.prefill_base
        before = forward.tokens * self.text.vocab * HALF
        return max(super().prefill(forward), logits) + before

    def decode(self, rows: int) -> int:
        return max(super().decode(rows), rows * self._head_elements() * HALF)

    def graph_buffers(self, captured: Sequence[int]) -> int:
        """The logits that each CUDA graph ends in; the largest one's are in the graphs' pool."""
        return (sum(captured) - max(captured)) * self.text.vocab * HALF

    def _head_elements(self) -> int:
        copies = _HEAD_COPIES * self.text.hidden
        return self.text.vocab + copies + self.constants.token_elements

    def _attention_elements(self) -> int:
        mla, text = self.text.mla, self.text
        assert mla is not None
        per_head = mla.nope_dim + mla.v_dim + _LAID_OUT * mla.key_dim
        alive = _COPIES * text.hidden + mla.kv_rank + mla.rope_dim + self._token_elements()
        return alive + text.heads * per_head


def activations_of(model: Model, settings: Settings, constants: PytorchConstants) -> Activations:
    kind = MiniCPM3Activations if model.text.expands_latent else Activations
    return kind(model, settings, constants)
