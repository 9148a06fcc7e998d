"""Tensors of vision and audio towers, as the models are published."""

from __future__ import annotations

from collections.abc import Iterator

from turbofit.core.model import AudioDims
from turbofit.rehearse.checkpoint.dims import Vision
from turbofit.rehearse.checkpoint.linears import Entry, dense, norm

__all__ = [
    "TOWERS", "audio_tower", "qwen2_5_omni_vit", "qwen3_omni_vit", "qwen3_vit", "qwen_vit",
]  # fmt: skip

#: What a merger's tensors are called in Qwen3-VL, and in Qwen3-Omni.
_OMNI_MERGER = ((".linear_fc1", ".mlp.0"), (".linear_fc2", ".mlp.2"), (".norm.", ".ln_q."))


def _internvit(v: Vision, out: int, dtype: str) -> Iterator[Entry]:
    """InternViT and InternVL2's projector, in the names of InternVLChatModel."""
    pre = "vision_model.embeddings."
    yield f"{pre}class_embedding", dtype, (1, 1, v.hidden)
    yield f"{pre}patch_embedding.weight", dtype, (v.hidden, 3, v.patch, v.patch)
    yield f"{pre}patch_embedding.bias", dtype, (v.hidden,)
    yield f"{pre}position_embedding", dtype, (1, (v.image // v.patch) ** 2 + 1, v.hidden)
    for i in range(v.layers):
        at = f"vision_model.encoder.layers.{i}."
        yield from dense(f"{at}attn.qkv", 3 * v.hidden, v.hidden, dtype, v.qkv_bias)
        yield from dense(f"{at}attn.proj", v.hidden, v.hidden, dtype, True)
        if v.qk_norm:
            yield from norm(f"{at}attn.q_norm", v.hidden, dtype)
            yield from norm(f"{at}attn.k_norm", v.hidden, dtype)
        yield from dense(f"{at}mlp.fc1", v.inter, v.hidden, dtype, True)
        yield from dense(f"{at}mlp.fc2", v.hidden, v.inter, dtype, True)
        yield from norm(f"{at}norm1", v.hidden, dtype, not v.rms_norm)
        yield from norm(f"{at}norm2", v.hidden, dtype, not v.rms_norm)
        yield f"{at}ls1", dtype, (v.hidden,)
        yield f"{at}ls2", dtype, (v.hidden,)
    yield from norm("mlp1.0", 4 * v.hidden, dtype, True)
    yield from dense("mlp1.1", out, 4 * v.hidden, dtype, True)
    yield from dense("mlp1.3", out, out, dtype, True)


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
            yield from dense(f"{at}attention.{name}", v.hidden, v.hidden, dtype, v.qkv_bias)
        yield from dense(f"{at}attention.projection_layer", v.hidden, v.hidden, dtype, True)
        yield from dense(f"{at}mlp.fc1", v.inter, v.hidden, dtype, True)
        yield from dense(f"{at}mlp.fc2", v.hidden, v.inter, dtype, True)
        yield from norm(f"{at}layernorm_before", v.hidden, dtype, True)
        yield from norm(f"{at}layernorm_after", v.hidden, dtype, True)
        yield f"{at}lambda_1", dtype, (v.hidden,)
        yield f"{at}lambda_2", dtype, (v.hidden,)
    yield from norm("multi_modal_projector.layer_norm", 4 * v.hidden, dtype, True)
    yield from dense("multi_modal_projector.linear_1", out, 4 * v.hidden, dtype, True)
    yield from dense("multi_modal_projector.linear_2", out, out, dtype, True)


def _moonvit(v: Vision, out: int, dtype: str) -> Iterator[Entry]:
    """Kimi-K2.5's tower, whose learnt positions are a square, and its projector."""
    pre, merged = "vision_tower.", 4 * v.hidden
    side = v.image // v.patch
    yield f"{pre}patch_embed.pos_emb.weight", dtype, (side, side, v.hidden)
    yield f"{pre}patch_embed.proj.weight", dtype, (v.hidden, 3, v.patch, v.patch)
    yield f"{pre}patch_embed.proj.bias", dtype, (v.hidden,)
    for i in range(v.layers):
        at = f"{pre}encoder.blocks.{i}."
        yield from norm(f"{at}norm0", v.hidden, dtype, True)
        yield from norm(f"{at}norm1", v.hidden, dtype, True)
        yield from dense(f"{at}wqkv", 3 * v.hidden, v.hidden, dtype, True)
        yield from dense(f"{at}wo", v.hidden, v.hidden, dtype, True)
        yield from dense(f"{at}mlp.fc0", v.inter, v.hidden, dtype, True)
        yield from dense(f"{at}mlp.fc1", v.hidden, v.inter, dtype, True)
    yield from norm(f"{pre}encoder.final_layernorm", v.hidden, dtype, True)
    yield from norm("mm_projector.pre_norm", v.hidden, dtype, True)
    yield from dense("mm_projector.proj.0", merged, merged, dtype, True)
    yield from dense("mm_projector.proj.2", out, merged, dtype, True)


#: Those before a decoder whose tensors have a prefix.
TOWERS = {"internvit": _internvit, "internvit_hf": _internvit_hf, "moonvit": _moonvit}


def qwen_vit(v: Vision, out: int, dtype: str) -> Iterator[Entry]:
    """The towers of Qwen2-VL (layer norms, one MLP branch) and Qwen2.5-VL (RMS norms, gated)."""
    layer_norm = not v.rms_norm
    yield "visual.patch_embed.proj.weight", dtype, (v.hidden, 3, 2, v.patch, v.patch)
    for i in range(v.layers):
        at = f"visual.blocks.{i}."
        yield from norm(f"{at}norm1", v.hidden, dtype, layer_norm)
        yield from norm(f"{at}norm2", v.hidden, dtype, layer_norm)
        yield from dense(f"{at}attn.qkv", 3 * v.hidden, v.hidden, dtype, True)
        yield from dense(f"{at}attn.proj", v.hidden, v.hidden, dtype, True)
        if v.kind == "qwen2":
            yield from dense(f"{at}mlp.fc1", v.inter, v.hidden, dtype, True)
            yield from dense(f"{at}mlp.fc2", v.hidden, v.inter, dtype, True)
        else:
            yield from dense(f"{at}mlp.gate_proj", v.inter, v.hidden, dtype, True)
            yield from dense(f"{at}mlp.up_proj", v.inter, v.hidden, dtype, True)
            yield from dense(f"{at}mlp.down_proj", v.hidden, v.inter, dtype, True)
    yield from norm("visual.merger.ln_q", v.hidden, dtype, layer_norm)
    yield from dense("visual.merger.mlp.0", 4 * v.hidden, 4 * v.hidden, dtype, True)
    yield from dense("visual.merger.mlp.2", out, 4 * v.hidden, dtype, True)


def qwen3_vit(v: Vision, out: int, dtype: str) -> Iterator[Entry]:
    """Qwen3-VL's tower: learnt positions, and a merger for each layer that the decoder sees."""
    pre, merged = "model.visual.", 4 * v.hidden
    yield f"{pre}patch_embed.proj.weight", dtype, (v.hidden, 3, 2, v.patch, v.patch)
    yield f"{pre}patch_embed.proj.bias", dtype, (v.hidden,)
    yield f"{pre}pos_embed.weight", dtype, ((v.image // v.patch) ** 2, v.hidden)
    for i in range(v.layers):
        at = f"{pre}blocks.{i}."
        yield from norm(f"{at}norm1", v.hidden, dtype, True)
        yield from norm(f"{at}norm2", v.hidden, dtype, True)
        yield from dense(f"{at}attn.qkv", 3 * v.hidden, v.hidden, dtype, True)
        yield from dense(f"{at}attn.proj", v.hidden, v.hidden, dtype, True)
        yield from dense(f"{at}mlp.linear_fc1", v.inter, v.hidden, dtype, True)
        yield from dense(f"{at}mlp.linear_fc2", v.hidden, v.inter, dtype, True)
    for i in range(-1, v.deepstack):
        at = f"{pre}merger." if i < 0 else f"{pre}deepstack_merger_list.{i}."
        yield from norm(f"{at}norm", v.hidden if i < 0 else merged, dtype, True)
        yield from dense(f"{at}linear_fc1", merged, merged, dtype, True)
        yield from dense(f"{at}linear_fc2", out, merged, dtype, True)


def qwen2_5_omni_vit(v: Vision, out: int, dtype: str) -> Iterator[Entry]:
    """Queries, keys and values are three tensors."""
    for name, kind, shape in qwen_vit(v, out, dtype):
        before, joined, rest = f"thinker.{name}".partition(".qkv.")
        if not joined:
            yield before, kind, shape
        for one in "qkv" if joined else "":
            yield f"{before}.{one}.{rest}", kind, (shape[0] // 3, *shape[1:])


def qwen3_omni_vit(v: Vision, out: int, dtype: str) -> Iterator[Entry]:
    """Mergers have other names."""
    for name, kind, shape in qwen3_vit(v, out, dtype):
        merger, at, rest = name.replace("model.", "thinker.", 1).partition("merger")
        for old, new in _OMNI_MERGER if at else ():
            rest = rest.replace(old, new)
        yield f"{merger.removesuffix('deepstack_')}{at}{rest}", kind, shape


def audio_tower(v: Vision, out: int, dtype: str) -> Iterator[Entry]:
    """The audio tower of an omni model's thinker, with its projector."""
    a, pre = v.audio, "thinker.audio_tower."
    assert a is not None
    yield from _convolutions(a, pre, dtype)
    for i in range(a.layers):
        at = f"{pre}layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            bias = bool(a.channels) or name != "k_proj"
            yield from dense(f"{at}self_attn.{name}", a.hidden, a.hidden, dtype, bias)
        yield from norm(f"{at}self_attn_layer_norm", a.hidden, dtype, True)
        yield from dense(f"{at}fc1", a.intermediate, a.hidden, dtype, True)
        yield from dense(f"{at}fc2", a.hidden, a.intermediate, dtype, True)
        yield from norm(f"{at}final_layer_norm", a.hidden, dtype, True)
    yield from norm(f"{pre}ln_post", a.hidden, dtype, True)
    if not a.channels:
        yield f"{pre}audio_bos_eos_token.weight", dtype, (2, out)
        yield from dense(f"{pre}proj", out, a.hidden, dtype, True)
        return
    yield from dense(f"{pre}proj1", a.hidden, a.hidden, dtype, True)
    yield from dense(f"{pre}proj2", out, a.hidden, dtype, True)


def _convolutions(a: AudioDims, pre: str, dtype: str) -> Iterator[Entry]:
    for i in range(3 if a.channels else 2):
        at = f"{pre}conv2d{i + 1}" if a.channels else f"{pre}conv{i + 1}"
        ins, outs = (a.channels if i else 1), a.channels
        if not a.channels:
            ins, outs = (a.hidden if i else a.mel_bins), a.hidden
        yield f"{at}.weight", dtype, (outs, ins, 3, 3) if a.channels else (outs, ins, 3)
        yield f"{at}.bias", dtype, (outs,)
    if a.channels:
        yield from dense(f"{pre}conv_out", a.hidden, a.channels * a.shrunk_bins, dtype)
