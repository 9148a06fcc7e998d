"""Names, types and shapes of a checkpoint's tensors, as the models are published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from turbofit.rehearse.checkpoint.dims import RehearsedModel, RehearsedText
from turbofit.rehearse.checkpoint.linears import LINEARS, MX_GROUP, Entry, dense, norm
from turbofit.rehearse.checkpoint.tower_tensors import (
    TOWERS,
    audio_tower,
    qwen2_5_omni_vit,
    qwen3_omni_vit,
    qwen3_vit,
    qwen_vit,
)

_Names = tuple[str, str, str]
_Stored = tuple[Callable[..., Iterator[Entry]], str]
_DTYPE = {"bfloat16": "BF16", "float16": "F16"}
_NEXT = "qwen3_next"


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
        yield from norm(f"{at}attention_norm", t.hidden, dtype)
        yield from norm(f"{at}ffn_norm", t.hidden, dtype)
    yield from norm(f"{pre}model.norm", t.hidden, dtype)
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
    yield from dense(f"{at}gate", t.experts.count, t.hidden, stored[1])
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
        yield from dense(f"{at}q_a_proj", mla.q_rank, t.hidden, dtype)
        yield from norm(f"{at}q_a_layernorm", mla.q_rank, dtype)
        yield from dense(f"{at}q_b_proj", queries, mla.q_rank, dtype)
    else:
        yield from dense(f"{at}q_proj", queries, t.hidden, dtype)
    yield from dense(f"{at}kv_a_proj_with_mqa", mla.kv_rank + mla.rope_dim, t.hidden, dtype)
    yield from norm(f"{at}kv_a_layernorm", mla.kv_rank, dtype)
    yield from dense(f"{at}kv_b_proj", t.heads * (mla.nope_dim + mla.v_dim), mla.kv_rank, dtype)
    yield from dense(f"{at}o_proj", t.hidden, t.heads * mla.v_dim, dtype)


def _attention(at: str, t: RehearsedText, stored: _Stored) -> Iterator[Entry]:
    """Queries, keys, values and the output, with the norms or biases of the architecture."""
    (linear, dtype), bias = stored, t.arch in {"qwen2", "glm4_moe", "phimoe"}
    yield from linear(f"{at}q_proj", t.heads * t.dim, t.hidden, dtype, bias)
    yield from linear(f"{at}k_proj", t.kv_heads * t.dim, t.hidden, dtype, bias)
    yield from linear(f"{at}v_proj", t.kv_heads * t.dim, t.hidden, dtype, bias)
    yield from linear(f"{at}o_proj", t.hidden, t.heads * t.dim, dtype, t.arch == "phimoe")
    if t.arch.startswith("qwen3") or t.qk_norm:
        yield from norm(f"{at}q_norm", t.dim, dtype)
        yield from norm(f"{at}k_norm", t.dim, dtype)


def _drafting(at: str, t: RehearsedText, dtype: str) -> Iterator[Entry]:
    """What a layer that drafts has beside an ordinary one."""
    for name in ("embed_tokens", "shared_head.head"):
        yield f"{at}{name}.weight", dtype, (t.vocab, t.hidden)
    yield from dense(f"{at}eh_proj", t.hidden, 2 * t.hidden, dtype)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        yield from norm(f"{at}{name}", t.hidden, dtype)


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
        yield from norm(f"{at}input_layernorm", t.hidden, dtype, t.norm_bias)
        yield from norm(f"{at}post_attention_layernorm", t.hidden, dtype, t.norm_bias)
    yield from norm(f"{pre}model.norm", t.hidden, dtype, t.norm_bias)
    if not t.tied:
        yield from dense(f"{pre}lm_head", t.vocab, t.hidden, dtype, t.head_bias)


def _gpt_oss(t: RehearsedText, pre: str, stored: _Stored, *, mxfp4: bool) -> Iterator[Entry]:
    """gpt-oss: biases, sinks of attention, and all experts of a layer in tensors of their own."""
    (_, dtype), e = stored, t.experts
    query, key = t.heads * t.dim, t.kv_heads * t.dim
    assert e is not None
    yield f"{pre}model.embed_tokens.weight", dtype, (t.vocab, t.hidden)
    for i in range(t.layers):
        at = f"{pre}model.layers.{i}."
        yield from dense(f"{at}self_attn.q_proj", query, t.hidden, dtype, True)
        yield from dense(f"{at}self_attn.k_proj", key, t.hidden, dtype, True)
        yield from dense(f"{at}self_attn.v_proj", key, t.hidden, dtype, True)
        yield from dense(f"{at}self_attn.o_proj", t.hidden, query, dtype, True)
        yield f"{at}self_attn.sinks", dtype, (t.heads,)
        yield from dense(f"{at}mlp.router", e.count, t.hidden, dtype, True)
        for name, outs, ins in (
            ("gate_up", 2 * e.inter, t.hidden),
            ("down", t.hidden, e.inter),
        ):
            linear = f"{at}mlp.experts.{name}_proj"
            if mxfp4:
                yield f"{linear}_blocks", "U8", (e.count, outs, ins // MX_GROUP, MX_GROUP // 2)
                yield f"{linear}_scales", "U8", (e.count, outs, ins // MX_GROUP)
            else:
                yield linear, dtype, (e.count, ins, outs)
            yield f"{linear}_bias", dtype, (e.count, outs)
        yield from norm(f"{at}input_layernorm", t.hidden, dtype)
        yield from norm(f"{at}post_attention_layernorm", t.hidden, dtype)
    yield from norm(f"{pre}model.norm", t.hidden, dtype)
    yield f"{pre}lm_head.weight", dtype, (t.vocab, t.hidden)


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
    """A Qwen-VL's tensors behind one prefix, and the audio tower."""
    v, t, dtype = model.vision, model.text, stored[1]
    assert v is not None
    yield from _llama(t, "thinker.", stored)
    tower = qwen2_5_omni_vit if v.kind == "qwen2_5" else qwen3_omni_vit
    yield from tower(v, t.hidden, dtype)
    yield from audio_tower(v, t.hidden, dtype)


def _hybrid(t: RehearsedText, pre: str, stored: _Stored) -> Iterator[Entry]:
    """Qwen3.5 and Qwen3-Next: delta nets in most layers, gated attention in the others.

    In a quantised model the projections of the two gates stay unquantised: they have too few
    outputs.
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
            yield from norm(f"{at}self_attn.q_norm", t.dim, dtype)
            yield from norm(f"{at}self_attn.k_norm", t.dim, dtype)
        yield from _hybrid_mlp(f"{at}mlp.", t, stored)
        yield from norm(f"{at}input_layernorm", t.hidden, dtype)
        yield from norm(f"{at}post_attention_layernorm", t.hidden, dtype)
    yield from norm(f"{pre}norm", t.hidden, dtype)
    if not t.tied:
        yield "lm_head.weight", dtype, (t.vocab, t.hidden)


def _delta(at: str, t: RehearsedText, stored: _Stored) -> Iterator[Entry]:
    d, (linear, dtype) = t.delta, stored
    assert d is not None
    keys, values = d.key_heads * d.key_dim, d.value_heads * d.value_dim
    if t.arch == _NEXT:
        yield from linear(f"{at}in_proj_qkvz", 2 * (keys + values), t.hidden, dtype)
        yield from dense(f"{at}in_proj_ba", 2 * d.value_heads, t.hidden, dtype)
    else:
        yield from linear(f"{at}in_proj_qkv", 2 * keys + values, t.hidden, dtype)
        yield from linear(f"{at}in_proj_z", values, t.hidden, dtype)
        yield from dense(f"{at}in_proj_b", d.value_heads, t.hidden, dtype)
        yield from dense(f"{at}in_proj_a", d.value_heads, t.hidden, dtype)
    yield from linear(f"{at}out_proj", t.hidden, values, dtype)
    yield f"{at}A_log", dtype, (d.value_heads,)
    yield f"{at}dt_bias", dtype, (d.value_heads,)
    yield f"{at}conv1d.weight", dtype, (2 * keys + values, 1, d.kernel)
    yield from norm(f"{at}norm", d.value_dim, dtype)


def _hybrid_mlp(at: str, t: RehearsedText, stored: _Stored) -> Iterator[Entry]:
    """A dense network, or experts: Qwen3.5's are two tensors a layer at 16 bits."""
    e, dtype = t.experts, stored[1]
    if e is None:
        yield from _ffn(at, _GATED, (t.hidden, t.inter), stored)
        return
    if stored[0] is dense and t.arch != _NEXT:
        yield from dense(f"{at}gate", e.count, t.hidden, dtype)
        yield f"{at}experts.gate_up_proj", dtype, (e.count, 2 * e.inter, t.hidden)
        yield f"{at}experts.down_proj", dtype, (e.count, t.hidden, e.inter)
    else:
        yield from _experts(at, _GATED, t, stored)
    yield from dense(f"{at}shared_expert_gate", 1, t.hidden, dtype)
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
    stored = (LINEARS[model.packing], dtype)
    if model.text.delta is not None:
        inner = "language_model." if model.vision else ""
        yield from _hybrid(model.text, f"model.{inner}", stored)
        if model.vision is not None:
            yield from qwen3_vit(model.vision, model.text.hidden, dtype)
        return
    if model.vision is not None and model.vision.audio is not None:
        yield from _omni(model, stored)
        return
    if model.text.fourier and model.vision is not None:
        yield from _intern_s1_pro(model.text, stored)
        yield from qwen3_vit(model.vision, model.text.hidden, dtype)
        return
    prefixed = model.vision is not None and model.vision.kind in TOWERS
    decoders: dict[str, Callable[..., Iterator[Entry]]] = {
        "internlm2": _internlm2,
        "gpt_oss": partial(_gpt_oss, mxfp4=model.packing == "mxfp4"),
    }
    decoder = decoders.get(model.text.arch, _llama)
    named = decoder(model.text, "language_model." if prefixed else "", stored)
    qwen3_vl = model.vision is not None and model.vision.kind == "qwen3"
    yield from _qwen3_vl_names(named, model.text) if qwen3_vl else named
    if model.vision is not None:
        tower = qwen3_vit if qwen3_vl else TOWERS.get(model.vision.kind, qwen_vit)
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
