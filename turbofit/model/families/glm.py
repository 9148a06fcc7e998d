"""GLM-4 and GLM-4V in their authors' format (ChatGLM), whose keys are not Transformers'."""

from __future__ import annotations

from turbofit.core.model import TextDims
from turbofit.model.config import Section
from turbofit.model.families.dims import Dims, Parts
from turbofit.model.families.eva_clip import read_eva_clip, square_rule

__all__ = ["read_chatglm"]


def read_chatglm(parts: Parts) -> Dims:
    """A ChatGLMModel, with EVA-CLIP where it is a GLM-4V; names and defaults are its remote code's.

    Raises:
        UsageError: a key is missing, or a variant that LMDeploy 0.18 does not run.
    """
    config = parts.config
    text = _text(config)
    section = config.section("vision_config")
    if section is None:
        return Dims(text)
    vision = read_eva_clip(section, "eva_clip_glm", merge=2, projector=text.intermediate)
    return Dims(text, vision, square_rule(vision))


def _text(config: Section) -> TextDims:
    hidden = config.integer("hidden_size", 4096, high=1 << 18)
    heads = config.integer("num_attention_heads", 32, high=1 << 12)
    if hidden % heads:
        raise config.error("num_attention_heads", f"{heads} does not divide {hidden} channels")
    if config.integer("kv_channels", 128, high=1 << 10) != hidden // heads:
        raise config.error("kv_channels", f"is not {hidden} / {heads}, as LMDeploy takes it")
    if not config.boolean("rmsnorm", True) or not config.boolean("post_layer_norm", True):
        raise config.error("rmsnorm", "or post_layer_norm is false, which LMDeploy does not run")
    grouped = config.boolean("multi_query_attention", False)
    kv_heads = config.integer("multi_query_group_num", 1, high=1 << 12) if grouped else heads
    if heads % kv_heads:
        raise config.error("multi_query_group_num", f"{kv_heads} does not divide {heads} heads")
    bias = config.boolean("add_bias_linear", False)
    return TextDims(
        architecture="ChatGLMModel",
        layers=config.integer("num_layers", 28, high=1 << 10),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate=config.integer("ffn_hidden_size", 13696, high=1 << 20),
        vocab=config.integer("padded_vocab_size", 65024),
        max_position_embeddings=config.integer("seq_length", 2048, high=1 << 30),
        qkv_bias=bias or config.boolean("add_qkv_bias", False),
        output_bias=bias,
        mlp_bias=bias,
    )
