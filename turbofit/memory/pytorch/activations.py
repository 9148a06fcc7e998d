"""The memory of one forward in the PyTorch engine, as torch's own allocator counts memory.

The engine runs the model's code eagerly for every prefill. The peak is the largest sum of tensors
that are alive at one moment: in an MLP, in attention or in a delta net, of the decoder or of the
tower. Factors were counted in LMDeploy's modelling files, and compared with pretend GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from msgspec.structs import replace

from turbofit.core.model import Draft, MlaDims, Model, MoeDims
from turbofit.core.plan import Settings
from turbofit.core.struct import Struct
from turbofit.core.units import FLOAT, HALF, INT
from turbofit.memory.pytorch.adapters import widest_output
from turbofit.memory.pytorch.cache import TURBO_QUANT, block_tokens
from turbofit.memory.pytorch.weights import (
    WHOLE_TOWERS,
    PytorchConstants,
    expert_channels,
    kv_heads_held,
)
from turbofit.model.drafts import EAGLE3, STATES

#: Hidden states alive when deepstack features are added: embeddings, hidden, residual, the
#: scattered features, the mask, and torch's running count of the mask in 64 bits. Source:
#: lmdeploy models/qwen3_vl.py::Qwen3VLTextModel._deepstack_process #79a63f
_DEEPSTACK_COPIES = 9
#: Additional hidden states if text and image tokens have separate layers: the states gathered for
#: one kind of token, and the output of all tokens.
#: lmdeploy models/cogvlm.py::VisionExpertMLP.forward #feb7fa
_EXPERT_COPIES = 2
#: Memory of an output gate, in channels of the queries, an upper bound: the gate as projected, in a
#: new layout and after the sigmoid, the normed queries, and the product. Source:
#: lmdeploy pytorch/models/qwen3_5.py::Qwen3_5Attention.forward #2f2417
_GATED = 5
#: The size of pixels on the way to the card, as a multiple of `pixel_bytes`: they have 32 bits, not
#: 16. Seen for a next forward on pretend GPUs, exact for Qwen2-VL.
_AS_SENT = 2
_LLAMA4 = "Llama4ForCausalLM"
_PHI_MOE = "PhiMoEForCausalLM"
#: The model with one projection for queries, keys, values and z of a delta net. Source:
#: lmdeploy pytorch/models/qwen3_next.py::Qwen3NextGatedDeltaNet.__init__ #50eb1f
_NEXT = "Qwen3NextForCausalLM"
#: The model with experts whose activation is not fused. Source:
#: lmdeploy pytorch/models/gpt_oss.py::GateupAct._impl #3cf648
_GPT_OSS = "GptOssForCausalLM"
#: Products of the experts' width that this activation has in addition to a fused activation. Too
#: high if torch compiles the activation.
_UNFUSED = 3
#: Copies of queries and keys in Llama 4's rotation, an upper bound. Source:
#: lmdeploy models/llama4.py::Llama4TextAttention.forward #f6045e
_TURNED = 3
#: Memory that TurboQuant adds to attention, in channels of the queries: the rotated queries, and
#: for the rotation of the output a 32-bit copy, a 32-bit product and the result. The figure is too
#: high with the package fast_hadamard_transform.
#: lmdeploy turbo_quant.py::hadamard_rotate #5d1844
_ROTATED = 6
#: With fewer rows than this, torch's sort takes more memory a row. Source: torch 2.12's Sort.cu.
_SEGMENTED_SORT = 128
#: Parts of keys and values in a decode step's attention, which keeps a 32-bit output of each part.
#: A batch of few rows has more parts, but needs less memory. Source:
#: lmdeploy kernels/cuda/pagedattention.py::_get_split_k #4a7bcf
_SPLITS = 4
#: MoonViT's rotary tables: a complex number of 8 bytes for each pair of a head's channels and each
#: patch of a square of 512 x 512 patches. Source:
#: lmdeploy kimi_k25_vision.py::Rope2DPosEmbRepeated._precompute_freqs_cis #534474
_MOONVIT = "moonvit"
_TABLE_SIDE, _COMPLEX = 512, 8
#: How many tensors of a rotary table's size are alive at once while MoonViT makes the table: its
#: frequencies, their complex numbers, and the stacked copy. An upper bound.
_TABLES_MADE = 3
#: Hidden states of a patch in MoonViT's attention, which rotates queries and keys at 32 bits.
_TURNED_WIDE = 15
#: Tokens in one chunk of the gated delta rule. Source: fla/ops/gated_delta_rule/chunk.py.
_CHUNK = 64

#: Tensors of each head in MiniCPM3's attention: projected queries; queries, keys and padded values
#: in a new layout; output.
_LAID_OUT = 5
#: Hidden states of a token in MiniCPM3's attention: the scaled embeddings, the previous layer's
#: output, the residual, and the norm.
_COPIES = 4
#: The module with an input that adapters copy:
#: lmdeploy cuda/lora.py `x.flatten(0, -2).contiguous()`
_DOWN = "down_proj"
#: Hidden states that are alive with MiniCPM3's logits: those from the last norm, and scaled ones.
_HEAD_COPIES = 2

#: The most parts into which FlashAttention-3 cuts keys and values.
_MOST_PARTS = 128
#: FlashAttention-3 cuts nothing if whole sequences use at least 0.8 of the SMs. Otherwise it takes
#: the fewest parts whose use of the SMs is at least 0.85 of the best use.
_BUSY, _GOOD = 0.8, 0.85
#: The heads of a tile of queries in FlashMLA.
_QUERY_TILE = 64
#: Additional hidden states of a draft's layer, which joins embeddings and states. Source:
#: lmdeploy models/llama_eagle3.py::Eagle3LlamaModel.forward #0ff5db
_JOINED = 2
#: The most copies of the base's states that are alive. Source:
#: lmdeploy spec_decode/spec_agent.py::SpecModelAgent._prepare_inputs_from_main #66b53a
_STATES = 3
#: Additional hidden states of a draft's own layer: the normed states of the model, and the states
#: as they were given. Source:
#: lmdeploy models/qwen3_5_mtp.py `torch.cat([inputs_embeds, previous_hidden_states], dim=-1)`
_OWN = 2
#: The model's embeddings of a prompt with images, and their copy that is shifted by a token.
_EMBEDDINGS = 2


def attention_parts(kv_heads: int, processors: int) -> int:
    """Return the number of parts into which FlashAttention-3 cuts keys and values in a step.

    FlashAttention-3 plans a batch like a single sequence; a KV head's query rows are one tile. The
    figure is an upper bound: short sequences have fewer parts. Source: Dao-AILab/flash-attention
    hopper/heuristics.h ``num_splits_heuristic``, and hopper/flash_api.cpp ``get_num_splits``.
    """
    if kv_heads >= _BUSY * processors:
        return 1
    waves = [kv_heads * n / processors for n in range(1, min(_MOST_PARTS, processors) + 1)]
    uses = [wave / ceil(wave) for wave in waves]
    best = max(uses)
    return next(n for n, use in enumerate(uses, start=1) if use >= _GOOD * best)


def latent_parts(heads: int, processors: int) -> int:
    """Return the groups of multiprocessors among which FlashMLA deals a step's latents.

    ``heads`` are those of all tokens of a sequence's step.
    """
    return max(1, processors // ceil(heads / _QUERY_TILE))


def routed_elements(moe: MoeDims, expert: int, hidden: int) -> int:
    """Return the number of a token's tensor elements in a layer's experts on one rank.

    ``expert`` is the number of an expert's channels on the rank. Alive together are gate, up, the
    product and the output of each chosen expert, and 32-bit logits and softmax of all experts.
    lmdeploy cuda/moe/fused_moe.py::fused_moe #533a6a
    """
    return moe.experts_per_token * (3 * expert + hidden) + 3 * moe.experts


class Prefill(Struct):
    """One prefill: ``tokens`` of ``sequences``, the summed ``context``, and vision ``units``.

    During the prefill, the engine sends the pixels of ``next_units`` for the next forward.
    """

    tokens: int
    context: int
    units: int = 0
    sequences: int = 1
    next_units: int = 0


class Activations:
    """The memory of each stage of a forward, for one model with given settings."""

    def __init__(self, model: Model, settings: Settings, constants: PytorchConstants) -> None:
        self.model = model
        self.text = model.text
        self.settings = settings
        self.constants = constants
        self.tp = settings.tp
        self.expert = expert_channels(model, self.tp)
        reads_layers = model.draft and model.draft.algorithm == EAGLE3
        #: Elements of a token's hidden states that the model keeps for a draft of EAGLE-3; else 0.
        self.collected = STATES * model.text.hidden if reads_layers else 0
        #: Tokens of a sequence in one decoding step: one, and those that a draft proposes.
        self.step_tokens = 1 + model.draft.tokens if model.draft else 1
        #: The multiprocessors of the group's largest card; `PytorchAccount` sets them.
        self.processors = 0

    def graph_buffers(self, captured: Sequence[int]) -> int:
        """Return the bytes of CUDA graphs for the ``captured`` batch sizes.

        The graphs' tables and shared pool are not included. Graphs have outputs only for a draft.
        """
        given = self.collected + self.text.hidden if self.model.draft else 0
        return sum(captured) * self.step_tokens * given * HALF

    def draft_graphs(self, draft: Draft, captured: Sequence[int], blocks: int) -> int:
        """Return the bytes of a draft's CUDA graphs and of a draft's step.

        Each batch size has two graphs: one for all tokens of a step, one for a token of each
        sequence. Each graph has a table of ``blocks`` blocks, input states and output states.
        """
        hidden, rows = draft.text.hidden, max(captured, default=0) * self.step_tokens
        gives = 2 * hidden if self.collected else hidden
        each = self.step_tokens * ((self.collected or hidden) + gives) + hidden + gives
        parts = attention_parts(draft.text.kv_heads, self.processors)
        sums = rows * parts * draft.text.heads * (draft.text.head_dim + 1) * FLOAT
        step = self.draft_prefill(draft, Prefill(tokens=rows, context=0), 1) + sums
        return step + sum(captured) * (2 * blocks * INT + each * HALF)

    def draft_prefill(self, draft: Draft, forward: Prefill, chunks: int) -> int:
        """Return the bytes of a draft's prefill, with the base's states. Exact on pretend GPUs.

        If a prompt has several ``chunks``, a chunk's states are copied behind the last state of the
        previous chunk. States of up to three chunks are then alive.
        """
        text, tokens, constants = draft.text, forward.tokens, self.constants
        queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
        states = min(chunks, _STATES) * (self.collected or text.hidden)
        each = states + constants.hidden_copies * text.hidden + constants.token_elements
        attention = _JOINED * text.hidden + 2 * (queries + keys + text.heads)
        attention = tokens * attention + 2 * keys * forward.context
        return (tokens * each + max(tokens * 2 * text.intermediate, attention)) * HALF

    def of_draft(self, draft: Draft) -> Activations:
        """Return the activations of a draft's own layers, which ranks divide as the model's."""
        work = Activations(replace(self.model, text=draft.text), self.settings, self.constants)
        work.processors = self.processors
        return work

    def own_graphs(self, draft: Draft, captured: Sequence[int], blocks: int) -> int:
        """Return the bytes on each rank of the CUDA graphs of a draft's own layers, and their pool.

        Graphs, tables and states are as those of `draft_graphs`.
        """
        hidden, rows = draft.text.hidden, max(captured, default=0)
        each = 2 * hidden * (self.step_tokens + 1)
        step = self.of_draft(draft).decode(rows) + rows * self.step_tokens * _OWN * hidden * HALF
        pool = step + self.constants.segment if captured else step
        return pool + sum(captured) * (2 * blocks * INT + each * HALF)

    def own_prefill(self, draft: Draft, forward: Prefill, chunks: int) -> int:
        """Return the bytes of a prefill of a draft's own layers, with the model's states.

        With images the model's embeddings are alive, too, and a copy of them behind the first. An
        upper bound: the features of images may have been freed. Source:
        lmdeploy spec_decode/spec_agent.py::SpecModelAgent._prepare_inputs_from_main #66b53a
        """
        kept = min(chunks, _STATES) + _OWN + (_EMBEDDINGS if forward.units else 0)
        states = forward.tokens * kept * draft.text.hidden * HALF
        return self.of_draft(draft)._decoder(forward) + states

    def further_pool(self) -> int:
        """Return the bytes that torch keeps after the warm-up in addition to the pool of one step.

        The router of Phi-3.5-MoE keeps one page for small tensors. Seen on pretend GPUs.
        """
        return self.constants.page if self.text.architecture == _PHI_MOE else 0

    def prefill(self, forward: Prefill) -> int:
        """Return the bytes of the largest stage in a prefill."""
        tower = self._vision(forward) if forward.units and self.model.vision is not None else 0
        return max(self._decoder(forward), tower)

    def tables(self) -> int:
        """Return the bytes of the tower's rotary tables, which stay after the first image."""
        vision = self.model.vision
        if vision is None or vision.kind != _MOONVIT:
            return 0
        return _TABLE_SIDE**2 * vision.head_dim // 2 * _COMPLEX

    def sampling(self, rows: int, kept: int = 0) -> int:
        """Return the bytes for logits and sampling of at most ``rows`` rows.

        ``kept`` are the bytes of a prefill that its draft reads after the sampling.
        With a draft, the logits of all tokens are alive, and a copy of the last token's logits.
        Later a copy of the other tokens' logits becomes probabilities at 32 bits. Exact on pretend
        GPUs. Source:
        lmdeploy backends/cuda/rejection_sampling.py::CudaRejectionSamplingImpl.forward #370a48
        """
        few = min(rows, _SEGMENTED_SORT - 1) * self.constants.logit_few
        many = rows * self.constants.logit if rows >= _SEGMENTED_SORT else 0
        size, proposed = max(few, many), self.step_tokens - 1
        alone = size * self.text.vocab + kept
        if proposed:
            logits = HALF * (self.step_tokens + 1)
            size = max(size + rows * logits, rows * (logits + (HALF + 2 * FLOAT) * proposed))
        return max(size * self.text.vocab, alone) + self.constants.sampling_base

    def decode(self, rows: int) -> int:
        """Return the bytes of one decoding step with ``rows`` sequences."""
        mlp = max(self._mlp_elements(), self._moe_elements() + self._unfused_elements())
        parts = _SPLITS
        if self.model.draft:
            heads = kv_heads_held(self.text.kv_heads, self.tp) // self.tp
            parts = attention_parts(heads, self.processors)
        per_head = parts * 2 * (self.text.head_dim + 2)  # the outputs of attention's parts
        sums = 0
        if (mla := self.text.cached_latent) is None:
            attention = self._attention_elements() + int(self.text.heads / self.tp * per_head)
        elif self.model.draft:
            attention, sums = self._latent_elements(mla), self._latent_sums(mla, rows)
        else:
            attention = self._latent_elements(mla, per_head)
        each = rows * self.step_tokens * HALF
        return max(each * max(mlp, self._delta_elements()), each * attention + sums)

    def _latent_sums(self, mla: MlaDims, rows: int) -> int:
        """Return the bytes of FlashMLA's sums in a step: outputs and weights of parts at 32 bits.

        FlashMLA cuts the latents of ``rows`` sequences into at most one part for each sequence, and
        one more for each group of multiprocessors that takes a tile of the queries. Source:
        deepseek-ai/FlashMLA csrc/sm90 ``total_num_splits``, and ``num_sm_parts``.
        """
        heads = self.step_tokens * (self.text.heads // self.tp)
        parts = rows + latent_parts(heads, self.processors)
        return (parts * (mla.kv_rank + 1) + rows) * heads * FLOAT

    def restored(self, rows: int) -> int:
        """Return the bytes of the widest output of a module with adapters; 0 without adapters.

        The warm-up tries variants of the adapters' kernel. Each try adds to the output; the warm-up
        therefore keeps a copy. A copy of less than 1 MiB has a page of its own. Source:
        lmdeploy kernels/cuda/fused_lora.py `restore_value=['c_ptr']`
        """
        if not self.model.loras:
            return 0
        return rows * widest_output(self.model, self.tp) * HALF + self.constants.page

    def delta_warmup(self, rows: int) -> int:
        """Return the bytes that delta nets add to the warm-up, a prefill of one token a row."""
        if self.text.delta is None:
            return 0
        one_each = Prefill(tokens=rows, context=rows, sequences=rows)
        return self._delta(one_each) + self.constants.kernel_tuning

    def _decoder(self, forward: Prefill) -> int:
        """Return the bytes of the decoder's largest stage, with image features and pixels."""
        base, units = self.constants.prefill_base, forward.units
        if units:  # pixels and image features live until the forward ends
            features = self.model.features(units) * self.text.hidden * HALF
            pixels = _AS_SENT * self.model.pixel_bytes(units + forward.next_units)
            base += pixels + features + self._deepstack(units) + self.tables()
        base += self.constants.kernel_tuning if self.text.delta is not None else 0
        mlp, moe = forward.tokens * self._mlp_elements() * HALF, self._moe(forward.tokens)
        deep = 0
        if self._deepstack(forward.units):
            deep = forward.tokens * _DEEPSTACK_COPIES * self.text.hidden * HALF
        return base + max(mlp, moe, deep, self._attention(forward), self._delta(forward))

    def _moe(self, tokens: int) -> int:
        """Return the bytes of a layer's experts and of the tuning of kernels; 0 without experts.

        The first forwards of a size tune the kernels.
        """
        size, summed = tokens * self._moe_elements() * HALF, tokens * self.text.hidden * HALF
        if not size:
            return 0
        # The experts' outputs are summed after the kernels are tuned. Experts in 4 bits have only
        # one kernel.
        packed = self.model.quantization is not None and self.model.quantization.of_experts
        tuning = 0 if self.text.delta is not None or packed else self.constants.kernel_tuning
        unfused = tokens * self._unfused_elements() * HALF
        return size + max(0, tuning - summed, unfused)

    def _unfused_elements(self) -> int:
        """Return a token's additional elements in experts without a fused activation, or 0."""
        moe = self.text.moe
        if moe is None or self.text.architecture != _GPT_OSS:
            return 0
        return _UNFUSED * moe.experts_per_token * self.expert

    def _mlp_elements(self) -> int:
        """Return the elements of a token in a layer's MLP: gate and up, and the live hidden states.

        A shared expert runs after the chosen experts, while the sum of their outputs is alive.
        """
        text, constants = self.text, self.constants
        width, copies = 2 * text.intermediate / self.tp, constants.hidden_copies
        if any(_DOWN in adapter.modules for adapter in self.model.loras):
            width += (
                text.intermediate / self.tp
            )  # a copy of the input, which is a part of gate and up
        if text.moe is not None:
            dense = width if text.moe.layers < text.layers else 0.0
            shared = 2 * text.moe.shared_intermediate / self.tp
            width = max(dense, shared + 2 * text.hidden if shared else 0.0)
        if text.vision_experts:
            copies += _EXPERT_COPIES
        return int(width + copies * text.hidden + self._token_elements())

    def _token_elements(self) -> int:
        """Return a token's elements besides hidden states: rotary tables, positions and metadata.

        Fourier position encoding has two tables for each KV head. Source:
        lmdeploy nn/rotary_embedding.py::FopeRotaryEmbedding.forward #55d2a5
        """
        text = self.text
        heads = max(1, text.kv_heads // self.tp) - 1 if text.fourier else 0
        # FlashAttention-3 also writes a sum of 32 bits for each head.
        drafted = self.collected + 2 * text.heads if self.model.draft else 0
        return self.constants.token_elements + 2 * heads * text.head_dim + drafted

    def _moe_elements(self) -> int:
        """Return how many tensor elements a token has in a layer of experts; 0 without experts."""
        text, moe, constants = self.text, self.text.moe, self.constants
        if moe is None:
            return 0
        routed = routed_elements(moe, self.expert, text.hidden)
        if text.architecture == _LLAMA4:
            # Weighted inputs of the experts, and the outputs of experts and of the shared expert.
            routed += (moe.experts_per_token + 1) * text.hidden
        copies = constants.hidden_copies
        return int(routed + copies * text.hidden + self._token_elements())

    def _latent_elements(self, mla: MlaDims, more: int = 0) -> int:
        """Return the elements of a token in attention to latents, plus ``more`` for each head.

        The elements are the queries (channels of latent and position), the rotated position, and
        the output, first in the latent's channels, then in the values' channels. Source:
        lmdeploy models/deepseek_v2.py `attn_output.new_empty(q_len, num_heads, `
        """
        text, constants = self.text, self.constants
        per_head = text.head_dim + mla.rope_dim + mla.kv_rank + mla.v_dim + more
        alive = (constants.hidden_copies - 1) * text.hidden + constants.token_elements
        return alive + text.heads // self.tp * per_head + text.head_dim + mla.kv_rank

    def _latent(self, mla: MlaDims, forward: Prefill) -> int:
        """Return the bytes of attention to latents.

        Flattened latents are freed before values are made.
        """
        tokens = forward.tokens
        values = tokens * self.text.heads // self.tp * mla.v_dim
        padded = 2 * block_tokens(self.text, self.settings)
        flattened = (forward.context + padded) * self.text.head_dim
        return (tokens * self._latent_elements(mla) + max(0, flattened - values)) * HALF

    def _attention(self, forward: Prefill) -> int:
        """Return the bytes of attention: projections and output of the tokens, and flattened KV."""
        if (mla := self.text.cached_latent) is not None:
            return self._latent(mla, forward)
        kv = kv_heads_held(self.text.kv_heads, self.tp) // self.tp * self.text.head_dim
        tokens = forward.tokens * self._attention_elements()
        return (tokens + 2 * kv * forward.context) * HALF

    def _attention_elements(self) -> int:
        """Return a token's elements in a layer's attention, without flattened keys and values."""
        text, constants = self.text, self.constants
        heads = text.heads * text.head_dim / self.tp
        kv = kv_heads_held(text.kv_heads, self.tp) // self.tp * text.head_dim
        # One hidden state fewer than in the MLP; the projections are added below.
        alive = (constants.hidden_copies - 1) * text.hidden + self._token_elements()
        extra = _GATED * heads if text.output_gate else 0
        if text.architecture == _LLAMA4:
            extra = _TURNED * (heads + kv)
        elif text.qk_norm and not text.output_gate:
            # Normed queries and keys are alive with the original queries and keys.
            extra = heads + kv
        if self.settings.quant_policy == TURBO_QUANT:
            extra += _ROTATED * heads
        return int(alive + 2 * heads + 2 * kv + extra)

    def _delta(self, forward: Prefill) -> int:
        """Return the bytes of the gated delta rule in chunks, with states of chunks and sequences.

        The tensors were counted in the sources of LMDeploy and fla. The count is an upper bound:
        all tensors of a forward live at once, chunk matrices have 32 bits as in older fla, and
        every sequence ends in a chunk of its own. On pretend GPUs (fla 0.6.0, Qwen3-Next), 8,192
        tokens of one sequence took 1,161 MiB; the count is 1,230 MiB. 6,000 tokens of 375 sequences
        took 2,341 MiB; the count is 2,444 MiB.
        """
        delta = self.text.delta
        if delta is None:
            return 0
        heads = delta.value_heads // self.tp
        state = heads * delta.key_dim * delta.value_dim
        window = delta.channels // self.tp * 2 * delta.kernel
        # For each sequence: the state that is read, the final state in 32 bits, a chunk's state.
        # The 16-bit copy of the final state is made after the chunks are freed.
        elements = forward.tokens * (self._delta_elements() + -(-state // _CHUNK))
        return (elements + min(forward.sequences, forward.tokens) * (4 * state + window)) * HALF

    def _delta_elements(self) -> int:
        """Return a token's 16-bit elements in a delta net, without the chunk's states.

        The number is 0 without delta nets.
        """
        text, constants = self.text, self.constants
        delta = text.delta
        if delta is None:
            return 0
        heads = delta.value_heads // self.tp
        keys, values = heads * delta.key_dim, heads * delta.value_dim
        alive = (constants.hidden_copies - 1) * text.hidden + constants.token_elements
        # Tensors before and after the convolution; keys repeated for each value head, and w; the
        # gate z, values in a new layout, u, the new values and the output. If one projection makes
        # all inputs, the projection's z is alive with the copy of z.
        wide = 2 * (delta.channels // self.tp) + 3 * keys + 5 * values
        if text.architecture == _NEXT:
            wide += values
        # Two gates, beta, the decay and the 32-bit sum of decays, and three matrices of a chunk.
        return alive + wide + heads * (7 + 3 * _CHUNK)

    def _deepstack(self, units: int) -> int:
        """Return the bytes of tower features for the first layers, alive until the forward ends."""
        layers = self.model.vision.deepstack if self.model.vision is not None else 0
        return layers * self.model.features(units) * self.text.hidden * HALF

    def _vision(self, forward: Prefill) -> int:
        """Return the bytes of the tower, which encodes all images of the forward in one call."""
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
    """The memory of MiniCPM3, which caches expanded latents.

    A prefill makes logits for all tokens of the prefill. Checked on pretend GPUs.
    Source: lmdeploy pytorch/models/minicpm3.py::MiniCPM3ForCausalLM.forward #f412db
    """

    def prefill(self, forward: Prefill) -> int:
        """Return the bytes of the largest stage, plus the logits of the previous forward.

        If a prompt is cut into chunks, a view of the last row keeps the logits of a chunk alive.
        For the first chunk the figure is too high.
        """
        logits = forward.tokens * self._head_elements() * HALF + self.constants.prefill_base
        before = forward.tokens * self.text.vocab * HALF
        return max(super().prefill(forward), logits) + before

    def decode(self, rows: int) -> int:
        return max(super().decode(rows), rows * self._head_elements() * HALF)

    def graph_buffers(self, captured: Sequence[int]) -> int:
        """Return the bytes of CUDA graphs' logits; the pool has the logits of the largest graph."""
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
