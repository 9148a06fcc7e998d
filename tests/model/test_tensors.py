"""One small checkpoint written out by hand, and what is made of the list of its tensors."""

from __future__ import annotations

from math import prod

from turbofit.core.model import Model, ModelSource, MoeDims, TextDims, VisionDims
from turbofit.memory.pytorch import weights as pytorch
from turbofit.memory.turbomind import weights as turbomind
from turbofit.model import parameters
from turbofit.rehearsal.checkpoint import twin

TEXT = TextDims(
    architecture="Qwen3MoeForCausalLM", layers=2, hidden=256, heads=8, kv_heads=2, head_dim=64,
    intermediate=512, vocab=1024, max_position_embeddings=4096, qk_norm=True,
    moe=MoeDims(experts=2, experts_per_token=1, intermediate=256, layers=1),
)  # fmt: skip
VISION = VisionDims(
    kind="internvit", layers=1, hidden=128, heads=2, intermediate=256, patch_size=14,
    image_size=56, qk_norm=True,
)  # fmt: skip
MODEL = Model(
    name="small", architecture="InternVLChatModel", dtype="bfloat16", parameters=0, weight_bytes=0,
    text=TEXT, vision=VISION, source=ModelSource(kind="preset", where="small", sizes="formula"),
)  # fmt: skip
#: Names and shapes as InternVLChatModel and Transformers' Qwen3MoeForCausalLM have them; behind
#: them the engines that give each of two ranks a half: TurboMind (t), PyTorch (p).
WRITTEN = """
language_model.model.embed_tokens.weight 1024x256 t
language_model.model.layers.0.self_attn.q_proj.weight 512x256 tp
language_model.model.layers.0.self_attn.k_proj.weight 128x256 tp
language_model.model.layers.0.self_attn.v_proj.weight 128x256 tp
language_model.model.layers.0.self_attn.o_proj.weight 256x512 tp
language_model.model.layers.0.self_attn.q_norm.weight 64
language_model.model.layers.0.self_attn.k_norm.weight 64
language_model.model.layers.0.mlp.gate_proj.weight 512x256 tp
language_model.model.layers.0.mlp.up_proj.weight 512x256 tp
language_model.model.layers.0.mlp.down_proj.weight 256x512 tp
language_model.model.layers.0.input_layernorm.weight 256
language_model.model.layers.0.post_attention_layernorm.weight 256
language_model.model.layers.1.self_attn.q_proj.weight 512x256 tp
language_model.model.layers.1.self_attn.k_proj.weight 128x256 tp
language_model.model.layers.1.self_attn.v_proj.weight 128x256 tp
language_model.model.layers.1.self_attn.o_proj.weight 256x512 tp
language_model.model.layers.1.self_attn.q_norm.weight 64
language_model.model.layers.1.self_attn.k_norm.weight 64
language_model.model.layers.1.mlp.gate.weight 2x256
language_model.model.layers.1.mlp.experts.0.gate_proj.weight 256x256 tp
language_model.model.layers.1.mlp.experts.0.up_proj.weight 256x256 tp
language_model.model.layers.1.mlp.experts.0.down_proj.weight 256x256 tp
language_model.model.layers.1.mlp.experts.1.gate_proj.weight 256x256 tp
language_model.model.layers.1.mlp.experts.1.up_proj.weight 256x256 tp
language_model.model.layers.1.mlp.experts.1.down_proj.weight 256x256 tp
language_model.model.layers.1.input_layernorm.weight 256
language_model.model.layers.1.post_attention_layernorm.weight 256
language_model.model.norm.weight 256
language_model.lm_head.weight 1024x256 t
vision_model.embeddings.class_embedding 1x1x128
vision_model.embeddings.patch_embedding.weight 128x3x14x14
vision_model.embeddings.patch_embedding.bias 128
vision_model.embeddings.position_embedding 1x17x128
vision_model.encoder.layers.0.attn.qkv.weight 384x128 tp
vision_model.encoder.layers.0.attn.qkv.bias 384 t
vision_model.encoder.layers.0.attn.proj.weight 128x128 tp
vision_model.encoder.layers.0.attn.proj.bias 128
vision_model.encoder.layers.0.attn.q_norm.weight 128 t
vision_model.encoder.layers.0.attn.k_norm.weight 128 t
vision_model.encoder.layers.0.mlp.fc1.weight 256x128 tp
vision_model.encoder.layers.0.mlp.fc1.bias 256 t
vision_model.encoder.layers.0.mlp.fc2.weight 128x256 tp
vision_model.encoder.layers.0.mlp.fc2.bias 128
vision_model.encoder.layers.0.norm1.weight 128
vision_model.encoder.layers.0.norm1.bias 128
vision_model.encoder.layers.0.norm2.weight 128
vision_model.encoder.layers.0.norm2.bias 128
vision_model.encoder.layers.0.ls1 128
vision_model.encoder.layers.0.ls2 128
mlp1.0.weight 512
mlp1.0.bias 512
mlp1.1.weight 256x512 t
mlp1.1.bias 256 t
mlp1.3.weight 256x256 t
mlp1.3.bias 256
"""
ROWS = [(*line.split(), "")[:3] for line in WRITTEN.split("\n") if line]
SHAPES = {name: tuple(map(int, shape.split("x"))) for name, shape, _ in ROWS}
CONSTANTS = turbomind.load_constants()


def forget() -> None:
    """Clears what is kept of a list of tensors, which a test changes."""
    parameters.text_parameters.cache_clear()
    for cached in (turbomind._as_built, turbomind._text_classes, turbomind._tower_classes):
        cached.cache_clear()


def figures() -> dict[str, object]:
    """Count, bytes at tp 1 and 2 of both engines, and the stand-in's header."""
    forget()
    found: dict[str, object] = {"count": parameters.parameters(TEXT, VISION)}
    for tp in (1, 2):
        found[f"t{tp}"] = sum(turbomind.weight_classes(MODEL, tp, CONSTANTS).values())
        found[f"p{tp}"] = sum(pytorch.weight_classes(MODEL, tp).values())
    found["header"] = {name: shape for name, _, shape in twin.tensors(twin.twin_of(MODEL))}
    return found


def written() -> dict[str, object]:
    """The same of what is written out."""
    expected: dict[str, object] = {"count": sum(map(prod, SHAPES.values())), "header": SHAPES}
    for engine in "tp":
        for tp in (1, 2):
            expected[f"{engine}{tp}"] = sum(
                2 * prod(SHAPES[name]) // (tp if engine in split else 1) for name, _, split in ROWS
            )
    return expected


def test_counts_bytes_and_stand_in_are_those_of_one_checkpoint() -> None:
    """A tensor that the list leaves out is named by the header; count and bytes differ too."""
    assert figures() == written()
