"""Keys of ``config.json`` of Phi-3.5-MoE and MiniCPM3, whose rotation is made for long prompts."""

from __future__ import annotations

from typing import Any

from turbofit.core.json_types import JsonObject
from turbofit.rehearse.checkpoint.dims import RehearsedText

__all__ = ["minicpm3_config", "phimoe_config"]


def _longrope(dim: int, positions: int) -> dict[str, Any]:
    """Rotation for long prompts, as published: a factor for each pair of channels."""
    factors = [1.0] * (dim // 2)
    return {
        "type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": positions,
    }


def phimoe_config(t: RehearsedText) -> JsonObject:
    """What Phi-3.5-MoE's config has beside any other's."""
    scaling = _longrope(t.dim, 4096) | {"short_mscale": 1.25, "long_mscale": 1.25}
    return {
        "attention_bias": True,
        "lm_head_bias": t.head_bias,
        "input_jitter_noise": 0.01,
        "router_jitter_noise": 0.01,
        "sliding_window": t.positions,
        "original_max_position_embeddings": 4096,
        "rope_scaling": scaling,
    }


def minicpm3_config(t: RehearsedText) -> JsonObject:
    """What MiniCPM3's config has beside any other's."""
    assert t.mla is not None
    return {
        "q_lora_rank": t.mla.q_rank,
        "kv_lora_rank": t.mla.kv_rank,
        "qk_nope_head_dim": t.mla.nope_dim,
        "qk_rope_head_dim": t.mla.rope_dim,
        "attention_bias": False,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
        "rope_scaling": _longrope(t.mla.rope_dim, t.positions),
    }
