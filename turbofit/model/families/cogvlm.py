"""CogVLM and CogVLM2: image tokens go through linear layers of their own in every layer."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from turbofit.model.families.dims import CheckpointConfig, Dims
from turbofit.model.families.eva_clip import read_eva_clip, square_rule
from turbofit.model.families.text import read_text

__all__ = ["read"]

#: By this LMDeploy knows the first CogVLM, which has no convolution behind its tower.
_FIRST_POSITIONS: Final = 1226


def read(parts: CheckpointConfig) -> Dims:
    """A CogVLMForCausalLM, as its remote code and LMDeploy's read it."""
    config = parts.config
    text = read_text(config, "CogVLMForCausalLM")
    groups = "num_multi_query_heads"
    kv_heads = config.integer(groups, text.heads, high=1 << 12)
    if text.heads % kv_heads:
        raise config.error(groups, f"{kv_heads} does not divide {text.heads} heads")
    text = replace(
        text, kv_heads=kv_heads, vision_experts=True, vision_expert_bias=groups in config
    )
    section = config.required("vision_config")
    first = section.integer("num_positions") == _FIRST_POSITIONS
    vision = read_eva_clip(
        section, "eva_clip", merge=1 if first else 2, projector=text.intermediate
    )
    return Dims(text, vision, square_rule(vision))
