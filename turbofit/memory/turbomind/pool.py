"""Peaks of the executor's pool: what one forward holds at once, at its worst stage.

TurboMind's executor allocates every activation from one private pool that never gives memory back,
so what counts is the largest sum of tensors alive at one moment. Each function below adds up one
stage, in bytes, in the order in which `unified_decoder`, `unified_attention_layer`, `generation`,
`internvit` and `qwenvit` allocate and free. Checked against the 0.18 binary on pretend GPUs.
"""

from __future__ import annotations

from turbofit.core.model import Model, TextDims, VisionDims
from turbofit.core.plan import Settings
from turbofit.core.struct import Struct
from turbofit.core.units import HALF, round_up
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.memory.turbomind.delta import token_bytes
from turbofit.memory.turbomind.weights import (
    expert_width,
    ffn_width,
    kv_heads_held,
    lm_head_rows,
    vision_mlp_width,
    vision_side,
    vision_tp,
)

__all__ = ["Forward", "PoolModel"]

#: TurboMind casts logits from 16 bits to 32; a router's are made in 32.
_FLOAT = 4
#: Ids, offsets and masks of a pass, and what a stage allocates beside its tensors; over.
_BOOKKEEPING = 64 << 10
#: Offsets, positions, masks and the top-k kernels' scratch of one row; over by most of it.
_ROW = 4096
#: Whose experts have an activation that no kernel fuses into their products (``kSiluGptOss``).
_UNFUSED = frozenset({"GptOssForCausalLM"})


class Forward(Struct):
    """What meets in one forward pass.

    ``tokens`` run through the decoder; ``context`` is the summed length of the sequences that are
    being prefilled; ``rows`` are sequences that sample a token; ``units`` are tiles or patches of
    all images that overlap the pass, each encoded whole; ``top_k_0`` means that some row samples
    over the whole vocabulary. ``first_layer``: it is a warm-up, which runs that alone.
    """

    tokens: int
    context: int = 0
    rows: int = 1
    units: int = 0
    top_k_0: bool = False
    first_layer: bool = False


class PoolModel:
    """The stages of one model under one set of settings."""

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
        self.local_heads = text.heads // tp
        self.local_kv = kv_heads_held(text.kv_heads, tp) // tp
        self.ffn = ffn_width(text.intermediate, tp, model.quantization, constants) // tp
        self.symm = symmetric_buffer(text, settings)
        quantization = model.quantization
        packed = constants.packed_format(quantization, capability) if quantization else None
        self.ffn_streams = 1 if packed and packed.fused_silu else 2
        #: Bytes an element of a linear's input that is quantised for it.
        self.input_bytes = packed.input if packed else 0.0
        self.expert_streams = 1 if constants.expert_format(capability).fused_silu else 2
        if text.architecture in _UNFUSED:
            self.expert_streams = 2
        self.expert = 0
        if text.moe is not None:
            inner = text.moe.intermediate
            self.expert = expert_width(inner, tp, quantization, constants, capability) // tp

    def peak(self, forward: Forward) -> int:
        """The pool's largest live size over the stages of one forward."""
        stages = [self._decoder(forward), self._sampling(forward)]
        if forward.units and self.model.vision is not None:
            stages.append(self._vision(forward.units))
        return max(stages) + _BOOKKEEPING

    def _embeds(self, units: int) -> int:
        """Image features, held until the forward ends."""
        return self.model.features(units) * self.text.hidden * HALF

    def _decoder(self, forward: Forward) -> int:
        """Residual (and hidden where no symmetric buffer holds it) plus the widest layer stage."""
        text, tokens = self.text, forward.tokens
        streams = 2 if self.tp == 1 else 1
        held = tokens * text.hidden * HALF * streams + self._embeds(forward.units)
        stages = [self._attention(tokens, forward.context), self._mlp(forward)]
        if text.delta is not None:
            quantised = int(text.delta.values // self.tp * self.input_bytes)
            stages.append(tokens * (token_bytes(text.delta, self.tp) + quantised))
        return held + max(stages)

    def _attention(self, tokens: int, context: int) -> int:
        """QKV, output and the keys and values of all prefilled sequences, flattened.

        These are gone before the output is quantised for what comes after. Latents are both in one.
        """
        size = self.text.head_dim * HALF
        kinds = 1 if self.text.mla else 2
        queries = self.local_heads * (2 if self.text.output_gate else 1)
        qkv = tokens * (queries + kinds * self.local_kv) * size
        out = tokens * self.local_heads * size
        flat = kinds * self.local_kv * (context + self.constants.kv_flatten_pad_tokens) * size
        return qkv + out + max(flat, int(out / HALF * self.input_bytes))

    def _mlp(self, forward: Forward) -> int:
        """Gate and up of a dense layer, or their product; dense layers come before experts.

        Experts hold the router's scores, and for each routed token both and their output; a shared
        one runs while these outputs wait, into an output of its own.
        """
        moe, tokens = self.text.moe, forward.tokens
        dense = tokens * self.ffn * self.ffn_streams * HALF
        if self.input_bytes and moe is None:
            # Quantised input, and a fused product that is quantised too.
            dense = int(tokens * (self.text.hidden + self.ffn) * self.input_bytes)
        mixed = moe is not None and moe.layers < self.text.layers
        if moe is None or (mixed and forward.first_layer):
            return dense
        routed = tokens * moe.experts_per_token
        router = tokens * moe.experts * _FLOAT
        chosen = routed * self.expert_streams * self.expert * HALF
        shared = 0
        if moe.shared_intermediate:
            inner = moe.shared_intermediate // self.tp
            shared = tokens * (2 * inner + self.text.hidden) * HALF
        experts = router + routed * self.text.hidden * HALF + max(chosen, shared)
        return max(dense if mixed else 0, experts)

    def _sampling(self, forward: Forward) -> int:
        """Logits of every sampling row in 16 and 32 bits, then what sorting them takes.

        Of the forward's hidden states only the rows that sample are left by then.
        """
        logits = forward.rows * self.vocab_padded
        row = self.text.hidden * HALF + _ROW
        held = forward.rows * row + self._embeds(forward.units)
        cast = logits * (HALF + _FLOAT)
        sort = logits * (_FLOAT + 4)
        if forward.top_k_0:
            sort += logits * (4 + 8)
        return held + max(cast, sort)

    def _vision(self, units: int) -> int:
        vision = self.model.vision
        assert vision is not None
        if vision.kind == "internvit":
            return self._internvit(vision, units)
        return self._qwenvit(vision, units)

    def _internvit(self, vision: VisionDims, tiles: int) -> int:
        """All tiles at once on one GPU; chunks of what the symmetric buffer holds on several."""
        text = self.text
        side = vision_side(vision)
        sequence = side * side + 1
        out_tokens = self.model.features(1)
        chunk = tiles
        if self.tp > 1:
            row = max(sequence * vision.hidden, out_tokens * text.hidden)
            chunk = min(tiles, max(1, self.symm // HALF // row))
        ranks = vision_tp(vision, self.tp)
        token = sequence * vision.hidden * HALF
        streams = 2 if self.tp == 1 else 1  # residual, and hidden without a symmetric buffer
        patch_in = vision.channels * vision.patch_size**2
        pixels = vision.channels * (side * vision.patch_size) ** 2 * HALF
        patches = side * side * (patch_in + vision.hidden) * HALF
        merged = out_tokens * vision.hidden * vision.merge**2 * HALF
        inner = out_tokens * text.hidden // self.tp * HALF
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
        """All patches of the pass at once, whatever the prefill size.

        Learnt positions are looked up before, four a patch, and held until it is embedded.
        """
        ranks = vision_tp(vision, self.tp)
        head_dim = self.constants.vision_head_dims.get(vision.head_dim, vision.head_dim)
        width = vision.heads * head_dim // ranks * HALF
        hidden = vision.hidden * HALF
        in_symm = self.tp > 1 and patches * hidden <= self.symm
        streams = 1 if in_symm else 2
        rotary = vision.head_dim * HALF
        mlp = vision_mlp_width(vision, self.tp) // self.tp * HALF * (2 if vision.gated_mlp else 1)
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
    """Tokens of one forward at most: prefill plus batch, to a multiple of ``tp``."""
    return round_up(settings.max_prefill_token_num + settings.max_batch_size, settings.tp)


def symmetric_buffer(text: TextDims, settings: Settings) -> int:
    """Bytes of the communicators' shared buffer; 0 at tp 1."""
    if settings.tp == 1:
        return 0
    hidden = forward_tokens(settings) * text.hidden * HALF
    logits = settings.max_batch_size * lm_head_rows(text, settings.tp) * HALF
    return max(hidden, logits)
