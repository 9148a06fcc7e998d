"""Names, types and shapes of a checkpoint's tensors, as the models are published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from turbofit.core.model import AudioDims
from turbofit.rehearse.checkpoint.dims import RehearsedModel, RehearsedText, Vision

Entry = tuple[str, str, tuple[int, ...]]
_Names = tuple[str, str, str]
_Stored = tuple[Callable[..., Iterator[Entry]], str]
_DTYPE = {"bfloat16": "BF16", "float16": "F16"}
_GROUP = 128
_MX_GROUP = 32
_NEXT = "qwen3_next"
#: What a merger's tensors are called in Qwen3-VL, and in Qwen3-Omni.
_OMNI_MERGER = ((".linear_fc1", ".mlp.0"), (".linear_fc2", ".mlp.2"), (".norm.", ".ln_q."))


def _linear(name: str, outs: int, ins: int, dtype: str, bias: bool = False) -> Iterator[Entry]:
    yield f"{name}.weight", dtype, (outs, ins)
    if bias:
        yield f"{name}.bias", dtype, (outs,)


def _awq(name: str, outs: int, ins: int, dtype: str, bias: bool = False) -> Iterator[Entry]:
    yield f"{name}.qweight", "I32", (ins, outs // 8)
    yield f"{name}.qzeros", "I32", (ins // _GROUP, outs // 8)
    yield f"{name}.scales", "F16", (ins // _GROUP, outs)
    if bias:
        yield f"{name}.bias", dtype, (outs,)


def _fp8(name: str, outs: int, ins: int, dtype: str, bias: bool = False) -> Iterator[Entry]:
    yield f"{name}.weight", "F8_E4M3", (outs, ins)
    yield f"{name}.weight_scale_inv", "BF16", (-(-outs // _GROUP), -(-ins // _GROUP))
    if bias:
        yield f"{name}.bias", dtype, (outs,)


def _int4(name: str, outs: int, ins: int, dtype: str, bias: bool = False) -> Iterator[Entry]:
    """Of compressed-tensors, which packs experts alone here."""
    if ".experts." not in name:
        yield from _linear(name, outs, ins, dtype, bias)
        return
    yield f"{name}.weight_packed", "I32", (outs, ins // 8)
    yield f"{name}.weight_scale", dtype, (outs, ins // _MX_GROUP)
    yield f"{name}.weight_shape", "I32", (2,)


#: Of mxfp4 the experts alone are packed.
_LINEARS = {
    "": _linear, "awq": _awq, "fp8": _fp8, "mxfp4": _linear, "compressed-tensors": _int4,
}  # fmt: skip


def _norm(name: str, size: int, dtype: str, bias: bool = False) -> Iterator[Entry]:
    yield f"{name}.weight", dtype, (size,)
    if bias:
        yield f"{name}.bias", dtype, (size,)


def _internlm2(t: RehearsedText, pre: str, stored: _Stored) -> Iterator[Entry]:
    linear, dtype = stored
    qkv = (t.heads + 2 * t.kv_heads) * t.dim
    yield f"{pre}model.tok_embeddings.weight", dtype, (t.vocab, t.hidden)
    for i in range(t.layers):
        at = f"{pre}model.layers.{i}."
        yield from linear(f"{at}attention.wqkv", qkv, t.hidden, dtype)
        yield from linear(f"{at}attention.wo", t.hidden, t.heads * t.dim, dtype)
        yield from linear(f"{at}feed_forward.w1", t.inter, t.hidden, dtype)
        yield from linear(f"{at}feed_forward.w3", t.inter, t.hidden, dtype)
        yield from linear(f"{at}feed_forward.w2", t.hidden, t.inter, dtype)
        yield from _norm(f"{at}attention_norm", t.hidden, dtype)
        yield from _norm(f"{at}ffn_norm", t.hidden, dtype)
    yield from _norm(f"{pre}model.norm", t.hidden, dtype)
    yield f"{pre}output.weight", dtype, (t.vocab, t.hidden)


_GATED = ("gate_proj", "up_proj", "down_proj")


def _ffn(at: str, names: _Names, size: tuple[int, int], stored: _Stored) -> Iterator[Entry]:
    """A gated feed-forward network: gate, up and down by their names."""
    (hidden, inter), (linear, dtype), (gate, up, down) = size, stored, names
    yield from linear(f"{at}{gate}", inter, hidden, dtype)
    yield from linear(f"{at}{up}", inter, hidden, dtype)
    yield from linear(f"{at}{down}", hidden, inter, dtype)


def _experts(at: str, names: _Names, t: RehearsedText, stored: _Stored) -> Iterator[Entry]:
    """A router, which is never quantised, and a feed-forward network for each expert."""
    assert t.experts is not None
    yield from _linear(f"{at}gate", t.experts.count, t.hidden, stored[1])
    if t.experts.correction:
        yield f"{at}gate.e_score_correction_bias", "F32", (t.experts.count,)
    for e in range(t.experts.count):
        yield from _ffn(f"{at}experts.{e}.", names, (t.hidden, t.experts.inter), stored)
    if t.experts.shared and t.delta is None:
        yield from _ffn(f"{at}shared_experts.", names, (t.hidden, t.experts.shared), stored)


def _latents(at: str, t: RehearsedText, dtype: str) -> Iterator[Entry]:
    """Multi-head latent attention, at 16 bits."""
    mla = t.mla
    assert mla is not None
    queries = t.heads * (mla.nope_dim + mla.rope_dim)
    if mla.q_rank:
        yield from _linear(f"{at}q_a_proj", mla.q_rank, t.hidden, dtype)
        yield from _norm(f"{at}q_a_layernorm", mla.q_rank, dtype)
        yield from _linear(f"{at}q_b_proj", queries, mla.q_rank, dtype)
    else:
        yield from _linear(f"{at}q_proj", queries, t.hidden, dtype)
    yield from _linear(f"{at}kv_a_proj_with_mqa", mla.kv_rank + mla.rope_dim, t.hidden, dtype)
    yield from _norm(f"{at}kv_a_layernorm", mla.kv_rank, dtype)
    yield from _linear(f"{at}kv_b_proj", t.heads * (mla.nope_dim + mla.v_dim), mla.kv_rank, dtype)
    yield from _linear(f"{at}o_proj", t.hidden, t.heads * mla.v_dim, dtype)


def _attention(at: str, t: RehearsedText, stored: _Stored) -> Iterator[Entry]:
    """Queries, keys, values and the output, with the norms or biases of the architecture."""
    (linear, dtype), bias = stored, t.arch in {"qwen2", "glm4_moe", "phimoe"}
    yield from linear(f"{at}q_proj", t.heads * t.dim, t.hidden, dtype, bias)
    yield from linear(f"{at}k_proj", t.kv_heads * t.dim, t.hidden, dtype, bias)
    yield from linear(f"{at}v_proj", t.kv_heads * t.dim, t.hidden, dtype, bias)
    yield from linear(f"{at}o_proj", t.hidden, t.heads * t.dim, dtype, t.arch == "phimoe")
    if t.arch.startswith("qwen3") or t.qk_norm:
        yield from _norm(f"{at}q_norm", t.dim, dtype)
        yield from _norm(f"{at}k_norm", t.dim, dtype)


def _drafting(at: str, t: RehearsedText, dtype: str) -> Iterator[Entry]:
    """What a layer that drafts has beside an ordinary one."""
    for name in ("embed_tokens", "shared_head.head"):
        yield f"{at}{name}.weight", dtype, (t.vocab, t.hidden)
    yield from _linear(f"{at}eh_proj", t.hidden, 2 * t.hidden, dtype)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        yield from _norm(f"{at}{name}", t.hidden, dtype)


def _llama(t: RehearsedText, pre: str, stored: _Stored) -> Iterator[Entry]:
    """Llama, Qwen2 (biases on q, k and v), Qwen3 (norms on q and k), and those with experts."""
    dtype = stored[1]
    yield f"{pre}model.embed_tokens.weight", dtype, (t.vocab, t.hidden)
    for i in range(t.layers + t.drafting):
        at = f"{pre}model.layers.{i}."
        if i >= t.layers:
            yield from _drafting(at, t, dtype)
        if t.mla is not None:
            yield from _latents(f"{at}self_attn.", t, dtype)
        else:
            yield from _attention(f"{at}self_attn.", t, stored)
        if t.experts is None or i < t.experts.dense:
            yield from _ffn(f"{at}mlp.", _GATED, (t.hidden, t.inter), stored)
        elif t.arch in {"mixtral", "phimoe"}:
            yield from _experts(f"{at}block_sparse_moe.", ("w1", "w3", "w2"), t, stored)
        else:
            yield from _experts(f"{at}mlp.", _GATED, t, stored)
        yield from _norm(f"{at}input_layernorm", t.hidden, dtype, t.norm_bias)
        yield from _norm(f"{at}post_attention_layernorm", t.hidden, dtype, t.norm_bias)
    yield from _norm(f"{pre}model.norm", t.hidden, dtype, t.norm_bias)
    if not t.tied:
        yield from _linear(f"{pre}lm_head", t.vocab, t.hidden, dtype, t.head_bias)


def _gpt_oss(t: RehearsedText, pre: str, stored: _Stored, *, mxfp4: bool) -> Iterator[Entry]:
    """gpt-oss: biases, sinks of attention, and all experts of a layer in tensors of their own."""
    (_, dtype), e = stored, t.experts
    query, key = t.heads * t.dim, t.kv_heads * t.dim
    assert e is not None
    yield f"{pre}model.embed_tokens.weight", dtype, (t.vocab, t.hidden)
    for i in range(t.layers):
        at = f"{pre}model.layers.{i}."
        yield from _linear(f"{at}self_attn.q_proj", query, t.hidden, dtype, True)
        yield from _linear(f"{at}self_attn.k_proj", key, t.hidden, dtype, True)
        yield from _linear(f"{at}self_attn.v_proj", key, t.hidden, dtype, True)
        yield from _linear(f"{at}self_attn.o_proj", t.hidden, query, dtype, True)
        yield f"{at}self_attn.sinks", dtype, (t.heads,)
        yield from _linear(f"{at}mlp.router", e.count, t.hidden, dtype, True)
        for name, outs, ins in (
            ("gate_up", 2 * e.inter, t.hidden),
            ("down", t.hidden, e.inter),
        ):
            linear = f"{at}mlp.experts.{name}_proj"
            if mxfp4:
                yield f"{linear}_blocks", "U8", (e.count, outs, ins // _MX_GROUP, _MX_GROUP // 2)
                yield f"{linear}_scales", "U8", (e.count, outs, ins // _MX_GROUP)
            else:
                yield linear, dtype, (e.count, ins, outs)
            yield f"{linear}_bias", dtype, (e.count, outs)
        yield from _norm(f"{at}input_layernorm", t.hidden, dtype)
        yield from _norm(f"{at}post_attention_layernorm", t.hidden, dtype)
    yield from _norm(f"{pre}model.norm", t.hidden, dtype)
    yield f"{pre}lm_head.weight", dtype, (t.vocab, t.hidden)


def _internvit(v: Vision, out: int, dtype: str) -> Iterator[Entry]:
    """InternViT and InternVL2's projector, in the names of InternVLChatModel."""
    pre = "vision_model.embeddings."
    yield f"{pre}class_embedding", dtype, (1, 1, v.hidden)
    yield f"{pre}patch_embedding.weight", dtype, (v.hidden, 3, v.patch, v.patch)
    yield f"{pre}patch_embedding.bias", dtype, (v.hidden,)
    yield f"{pre}position_embedding", dtype, (1, (v.image // v.patch) ** 2 + 1, v.hidden)
    for i in range(v.layers):
        at = f"vision_model.encoder.layers.{i}."
        yield from _linear(f"{at}attn.qkv", 3 * v.hidden, v.hidden, dtype, v.qkv_bias)
        yield from _linear(f"{at}attn.proj", v.hidden, v.hidden, dtype, True)
        if v.qk_norm:
            yield from _norm(f"{at}attn.q_norm", v.hidden, dtype)
            yield from _norm(f"{at}attn.k_norm", v.hidden, dtype)
        yield from _linear(f"{at}mlp.fc1", v.inter, v.hidden, dtype, True)
        yield from _linear(f"{at}mlp.fc2", v.hidden, v.inter, dtype, True)
        yield from _norm(f"{at}norm1", v.hidden, dtype, not v.rms_norm)
        yield from _norm(f"{at}norm2", v.hidden, dtype, not v.rms_norm)
        yield f"{at}ls1", dtype, (v.hidden,)
        yield f"{at}ls2", dtype, (v.hidden,)
    yield from _norm("mlp1.0", 4 * v.hidden, dtype, True)
    yield from _linear("mlp1.1", out, 4 * v.hidden, dtype, True)
    yield from _linear("mlp1.3", out, out, dtype, True)


def _internvit_hf(v: Vision, out: int, dtype: str) -> Iterator[Entry]:
    """The same tower in the names of Transformers' InternVLForConditionalGeneration."""
    pre = "vision_tower.embeddings."
    yield f"{pre}cls_token", dtype, (1, 1, v.hidden)
    yield f"{pre}position_embeddings", dtype, (1, (v.image // v.patch) ** 2 + 1, v.hidden)
    patch = f"{pre}patch_embeddings.projection"
    yield f"{patch}.weight", dtype, (v.hidden, 3, v.patch, v.patch)
    yield f"{patch}.bias", dtype, (v.hidden,)
    for i in range(v.layers):
        at = f"vision_tower.encoder.layer.{i}."
        for name in ("q_proj", "k_proj", "v_proj"):
            yield from _linear(f"{at}attention.{name}", v.hidden, v.hidden, dtype, v.qkv_bias)
        yield from _linear(f"{at}attention.projection_layer", v.hidden, v.hidden, dtype, True)
        yield from _linear(f"{at}mlp.fc1", v.inter, v.hidden, dtype, True)
        yield from _linear(f"{at}mlp.fc2", v.hidden, v.inter, dtype, True)
        yield from _norm(f"{at}layernorm_before", v.hidden, dtype, True)
        yield from _norm(f"{at}layernorm_after", v.hidden, dtype, True)
        yield f"{at}lambda_1", dtype, (v.hidden,)
        yield f"{at}lambda_2", dtype, (v.hidden,)
    yield from _norm("multi_modal_projector.layer_norm", 4 * v.hidden, dtype, True)
    yield from _linear("multi_modal_projector.linear_1", out, 4 * v.hidden, dtype, True)
    yield from _linear("multi_modal_projector.linear_2", out, out, dtype, True)


def _moonvit(v: Vision, out: int, dtype: str) -> Iterator[Entry]:
    """Kimi-K2.5's tower, whose learnt positions are a square, and its projector."""
    pre, merged = "vision_tower.", 4 * v.hidden
    side = v.image // v.patch
    yield f"{pre}patch_embed.pos_emb.weight", dtype, (side, side, v.hidden)
    yield f"{pre}patch_embed.proj.weight", dtype, (v.hidden, 3, v.patch, v.patch)
    yield f"{pre}patch_embed.proj.bias", dtype, (v.hidden,)
    for i in range(v.layers):
        at = f"{pre}encoder.blocks.{i}."
        yield from _norm(f"{at}norm0", v.hidden, dtype, True)
        yield from _norm(f"{at}norm1", v.hidden, dtype, True)
        yield from _linear(f"{at}wqkv", 3 * v.hidden, v.hidden, dtype, True)
        yield from _linear(f"{at}wo", v.hidden, v.hidden, dtype, True)
        yield from _linear(f"{at}mlp.fc0", v.inter, v.hidden, dtype, True)
        yield from _linear(f"{at}mlp.fc1", v.hidden, v.inter, dtype, True)
    yield from _norm(f"{pre}encoder.final_layernorm", v.hidden, dtype, True)
    yield from _norm("mm_projector.pre_norm", v.hidden, dtype, True)
    yield from _linear("mm_projector.proj.0", merged, merged, dtype, True)
    yield from _linear("mm_projector.proj.2", out, merged, dtype, True)


#: Those before a decoder whose tensors have a prefix.
_TOWERS = {"internvit": _internvit, "internvit_hf": _internvit_hf, "moonvit": _moonvit}


def _qwen_vit(v: Vision, out: int, dtype: str) -> Iterator[Entry]:
    """The towers of Qwen2-VL (layer norms, one MLP branch) and Qwen2.5-VL (RMS norms, gated)."""
    layer_norm = not v.rms_norm
    yield "visual.patch_embed.proj.weight", dtype, (v.hidden, 3, 2, v.patch, v.patch)
    for i in range(v.layers):
        at = f"visual.blocks.{i}."
        yield from _norm(f"{at}norm1", v.hidden, dtype, layer_norm)
        yield from _norm(f"{at}norm2", v.hidden, dtype, layer_norm)
        yield from _linear(f"{at}attn.qkv", 3 * v.hidden, v.hidden, dtype, True)
        yield from _linear(f"{at}attn.proj", v.hidden, v.hidden, dtype, True)
        if v.kind == "qwen2":
            yield from _linear(f"{at}mlp.fc1", v.inter, v.hidden, dtype, True)
            yield from _linear(f"{at}mlp.fc2", v.hidden, v.inter, dtype, True)
        else:
            yield from _linear(f"{at}mlp.gate_proj", v.inter, v.hidden, dtype, True)
            yield from _linear(f"{at}mlp.up_proj", v.inter, v.hidden, dtype, True)
            yield from _linear(f"{at}mlp.down_proj", v.hidden, v.inter, dtype, True)
    yield from _norm("visual.merger.ln_q", v.hidden, dtype, layer_norm)
    yield from _linear("visual.merger.mlp.0", 4 * v.hidden, 4 * v.hidden, dtype, True)
    yield from _linear("visual.merger.mlp.2", out, 4 * v.hidden, dtype, True)


def _qwen3_vit(v: Vision, out: int, dtype: str) -> Iterator[Entry]:
    """Qwen3-VL's tower: learnt positions, and a merger for each layer that the decoder sees."""
    pre, merged = "model.visual.", 4 * v.hidden
    yield f"{pre}patch_embed.proj.weight", dtype, (v.hidden, 3, 2, v.patch, v.patch)
    yield f"{pre}patch_embed.proj.bias", dtype, (v.hidden,)
    yield f"{pre}pos_embed.weight", dtype, ((v.image // v.patch) ** 2, v.hidden)
    for i in range(v.layers):
        at = f"{pre}blocks.{i}."
        yield from _norm(f"{at}norm1", v.hidden, dtype, True)
        yield from _norm(f"{at}norm2", v.hidden, dtype, True)
        yield from _linear(f"{at}attn.qkv", 3 * v.hidden, v.hidden, dtype, True)
        yield from _linear(f"{at}attn.proj", v.hidden, v.hidden, dtype, True)
        yield from _linear(f"{at}mlp.linear_fc1", v.inter, v.hidden, dtype, True)
        yield from _linear(f"{at}mlp.linear_fc2", v.hidden, v.inter, dtype, True)
    for i in range(-1, v.deepstack):
        at = f"{pre}merger." if i < 0 else f"{pre}deepstack_merger_list.{i}."
        yield from _norm(f"{at}norm", v.hidden if i < 0 else merged, dtype, True)
        yield from _linear(f"{at}linear_fc1", merged, merged, dtype, True)
        yield from _linear(f"{at}linear_fc2", out, merged, dtype, True)


def _qwen3_vl_names(entries: Iterator[Entry], t: RehearsedText) -> Iterator[Entry]:
    """The decoder's tensors as Qwen3-VL names them; a layer's experts are two tensors."""
    e = t.experts
    for name, dtype, shape in entries:
        before, found, rest = name.replace("model.", "model.language_model.", 1).partition(
            ".experts."
        )
        if not found or e is None:
            yield before, dtype, shape
        elif rest.startswith("0.gate"):
            yield f"{before}.experts.gate_up_proj", dtype, (e.count, t.hidden, 2 * e.inter)
            yield f"{before}.experts.down_proj", dtype, (e.count, e.inter, t.hidden)


def _intern_s1_pro(t: RehearsedText, stored: _Stored) -> Iterator[Entry]:
    """The decoder as Qwen3-VL names it, an expert by itself, and two mixtures of frequencies."""
    for name, dtype, shape in _llama(t, "", stored):
        yield name.replace("model.", "model.language_model.", 1), dtype, shape
    for table in ("cos", "sin"):
        at = f"model.language_model.rotary_emb.{table}_coef"
        yield at, stored[1], (t.kv_heads, t.fourier, t.fourier)


def _omni(model: RehearsedModel, stored: _Stored) -> Iterator[Entry]:
    """A Qwen-VL's tensors behind one prefix, and the tower for sound."""
    v, t, dtype = model.vision, model.text, stored[1]
    assert v is not None
    yield from _llama(t, "thinker.", stored)
    tower = _qwen2_5_omni_vit if v.kind == "qwen2_5" else _qwen3_omni_vit
    yield from tower(v, t.hidden, dtype)
    yield from _audio_tower(v, t.hidden, dtype)


def _qwen2_5_omni_vit(v: Vision, out: int, dtype: str) -> Iterator[Entry]:
    """Queries, keys and values are three tensors."""
    for name, kind, shape in _qwen_vit(v, out, dtype):
        before, joined, rest = f"thinker.{name}".partition(".qkv.")
        if not joined:
            yield before, kind, shape
        for one in "qkv" if joined else "":
            yield f"{before}.{one}.{rest}", kind, (shape[0] // 3, *shape[1:])


def _qwen3_omni_vit(v: Vision, out: int, dtype: str) -> Iterator[Entry]:
    """Mergers have other names."""
    for name, kind, shape in _qwen3_vit(v, out, dtype):
        merger, at, rest = name.replace("model.", "thinker.", 1).partition("merger")
        for old, new in _OMNI_MERGER if at else ():
            rest = rest.replace(old, new)
        yield f"{merger.removesuffix('deepstack_')}{at}{rest}", kind, shape


def _audio_tower(v: Vision, out: int, dtype: str) -> Iterator[Entry]:
    a, pre = v.audio, "thinker.audio_tower."
    assert a is not None
    yield from _convolutions(a, pre, dtype)
    for i in range(a.layers):
        at = f"{pre}layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            bias = bool(a.channels) or name != "k_proj"
            yield from _linear(f"{at}self_attn.{name}", a.hidden, a.hidden, dtype, bias)
        yield from _norm(f"{at}self_attn_layer_norm", a.hidden, dtype, True)
        yield from _linear(f"{at}fc1", a.intermediate, a.hidden, dtype, True)
        yield from _linear(f"{at}fc2", a.hidden, a.intermediate, dtype, True)
        yield from _norm(f"{at}final_layer_norm", a.hidden, dtype, True)
    yield from _norm(f"{pre}ln_post", a.hidden, dtype, True)
    if not a.channels:
        yield f"{pre}audio_bos_eos_token.weight", dtype, (2, out)
        yield from _linear(f"{pre}proj", out, a.hidden, dtype, True)
        return
    yield from _linear(f"{pre}proj1", a.hidden, a.hidden, dtype, True)
    yield from _linear(f"{pre}proj2", out, a.hidden, dtype, True)


def _convolutions(a: AudioDims, pre: str, dtype: str) -> Iterator[Entry]:
    bins = a.mel_bins
    for i in range(3 if a.channels else 2):
        at = f"{pre}conv2d{i + 1}" if a.channels else f"{pre}conv{i + 1}"
        ins, outs = (a.channels if i else 1), a.channels
        if not a.channels:
            ins, outs = (a.hidden if i else bins), a.hidden
        yield f"{at}.weight", dtype, (outs, ins, 3, 3) if a.channels else (outs, ins, 3)
        yield f"{at}.bias", dtype, (outs,)
    if a.channels:
        for _ in range(3):
            bins = (bins + 1) // 2
        yield from _linear(f"{pre}conv_out", a.hidden, a.channels * bins, dtype)


def _hybrid(t: RehearsedText, pre: str, stored: _Stored) -> Iterator[Entry]:
    """Qwen3.5 and Qwen3-Next: delta nets in most layers, gated attention in the others.

    Of a quantised one the two gates' projections stay as they are: they have too few outputs.
    """
    (linear, dtype), d = stored, t.delta
    assert d is not None
    yield f"{pre}embed_tokens.weight", dtype, (t.vocab, t.hidden)
    for i in range(t.layers):
        at = f"{pre}layers.{i}."
        if (i + 1) % d.interval:
            yield from _delta(f"{at}linear_attn.", t, stored)
        else:
            yield from linear(f"{at}self_attn.q_proj", 2 * t.heads * t.dim, t.hidden, dtype)
            yield from linear(f"{at}self_attn.k_proj", t.kv_heads * t.dim, t.hidden, dtype)
            yield from linear(f"{at}self_attn.v_proj", t.kv_heads * t.dim, t.hidden, dtype)
            yield from linear(f"{at}self_attn.o_proj", t.hidden, t.heads * t.dim, dtype)
            yield from _norm(f"{at}self_attn.q_norm", t.dim, dtype)
            yield from _norm(f"{at}self_attn.k_norm", t.dim, dtype)
        yield from _hybrid_mlp(f"{at}mlp.", t, stored)
        yield from _norm(f"{at}input_layernorm", t.hidden, dtype)
        yield from _norm(f"{at}post_attention_layernorm", t.hidden, dtype)
    yield from _norm(f"{pre}norm", t.hidden, dtype)
    if not t.tied:
        yield "lm_head.weight", dtype, (t.vocab, t.hidden)


def _delta(at: str, t: RehearsedText, stored: _Stored) -> Iterator[Entry]:
    d, (linear, dtype) = t.delta, stored
    assert d is not None
    keys, values = d.key_heads * d.key_dim, d.value_heads * d.value_dim
    if t.arch == _NEXT:
        yield from linear(f"{at}in_proj_qkvz", 2 * (keys + values), t.hidden, dtype)
        yield from _linear(f"{at}in_proj_ba", 2 * d.value_heads, t.hidden, dtype)
    else:
        yield from linear(f"{at}in_proj_qkv", 2 * keys + values, t.hidden, dtype)
        yield from linear(f"{at}in_proj_z", values, t.hidden, dtype)
        yield from _linear(f"{at}in_proj_b", d.value_heads, t.hidden, dtype)
        yield from _linear(f"{at}in_proj_a", d.value_heads, t.hidden, dtype)
    yield from linear(f"{at}out_proj", t.hidden, values, dtype)
    yield f"{at}A_log", dtype, (d.value_heads,)
    yield f"{at}dt_bias", dtype, (d.value_heads,)
    yield f"{at}conv1d.weight", dtype, (2 * keys + values, 1, d.kernel)
    yield from _norm(f"{at}norm", d.value_dim, dtype)


def _hybrid_mlp(at: str, t: RehearsedText, stored: _Stored) -> Iterator[Entry]:
    """A dense network, or experts: Qwen3.5's are two tensors a layer at 16 bits."""
    e, dtype = t.experts, stored[1]
    if e is None:
        yield from _ffn(at, _GATED, (t.hidden, t.inter), stored)
        return
    if stored[0] is _linear and t.arch != _NEXT:
        yield from _linear(f"{at}gate", e.count, t.hidden, dtype)
        yield f"{at}experts.gate_up_proj", dtype, (e.count, 2 * e.inter, t.hidden)
        yield f"{at}experts.down_proj", dtype, (e.count, t.hidden, e.inter)
    else:
        yield from _experts(at, _GATED, t, stored)
    yield from _linear(f"{at}shared_expert_gate", 1, t.hidden, dtype)
    yield from _ffn(f"{at}shared_expert.", _GATED, (t.hidden, e.shared), stored)


def tensors(model: RehearsedModel) -> Iterator[Entry]:
    """Yields name, safetensors type and shape of every tensor of a model."""
    for name, dtype, shape in _tensors(model):
        if not model.intern_s1:
            yield name, dtype, shape
        elif name.startswith("language_model.lm_head"):
            yield name.removeprefix("language_model."), dtype, shape
        else:
            yield "model." + name.replace("language_model.model.", "language_model."), dtype, shape


def _tensors(model: RehearsedModel) -> Iterator[Entry]:
    dtype = _DTYPE[model.dtype]
    stored = (_LINEARS[model.packing], dtype)
    if model.text.delta is not None:
        inner = "language_model." if model.vision else ""
        yield from _hybrid(model.text, f"model.{inner}", stored)
        if model.vision is not None:
            yield from _qwen3_vit(model.vision, model.text.hidden, dtype)
        return
    if model.vision is not None and model.vision.audio is not None:
        yield from _omni(model, stored)
        return
    if model.text.fourier and model.vision is not None:
        yield from _intern_s1_pro(model.text, stored)
        yield from _qwen3_vit(model.vision, model.text.hidden, dtype)
        return
    prefixed = model.vision is not None and model.vision.kind in _TOWERS
    decoders: dict[str, Callable[..., Iterator[Entry]]] = {
        "internlm2": _internlm2,
        "gpt_oss": partial(_gpt_oss, mxfp4=model.packing == "mxfp4"),
    }
    decoder = decoders.get(model.text.arch, _llama)
    named = decoder(model.text, "language_model." if prefixed else "", stored)
    qwen3_vl = model.vision is not None and model.vision.kind == "qwen3"
    yield from _qwen3_vl_names(named, model.text) if qwen3_vl else named
    if model.vision is not None:
        tower = _qwen3_vit if qwen3_vl else _TOWERS.get(model.vision.kind, _qwen_vit)
        yield from tower(model.vision, model.text.hidden, dtype)


def parameters(model: RehearsedModel) -> int:
    """Parameters of a model that is not quantised; tied weights count once."""
    total = 0
    for _, _, shape in tensors(model):
        size = 1
        for n in shape:
            size *= n
        total += size
    return total
