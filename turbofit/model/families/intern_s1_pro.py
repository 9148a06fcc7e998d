"""Intern-S1-Pro: Qwen3-VL's tower without deepstack, before experts with Fourier position encoding.

A checkpoint with a tower for time series (``ts_config``) is refused. Videos are planned for by
nobody yet: the gateway takes none.
"""

from __future__ import annotations

from math import tau

from msgspec.structs import replace

from turbofit.model.config import Section
from turbofit.model.families.dims import CheckpointConfig, Dims
from turbofit.model.families.qwen3_vl import read_vision
from turbofit.model.families.qwen_vl import read_rule
from turbofit.model.families.text import read_text

__all__ = ["read"]


def read(parts: CheckpointConfig) -> Dims:
    """An InternS1ProForConditionalGeneration; absent keys take its own class's defaults."""
    parts.warn_without_processor()
    config = parts.config
    if "ts_config" in config:
        raise config.error("ts_config", "is a tower for time series, which no account is of")
    section = config.section("text_config") or Section({}, f"{config.what}: text_config")
    tied = config.boolean("tie_word_embeddings", False)
    text = read_text(section, "Qwen3VLMoeTextModel")
    text = replace(text, tie_word_embeddings=tied, fourier=_frequencies(section, text.head_dim))
    inner = config.section("vision_config")
    if inner and inner.integers("deepstack_visual_indexes"):
        raise inner.error("deepstack_visual_indexes", "is given, and LMDeploy drops its features")
    vision = replace(read_vision(config, text.hidden), deepstack=0)
    return Dims(text, vision, replace(read_rule(parts.processor, vision), client_knobs=False))


def _frequencies(text: Section, head_dim: int) -> int:
    """Those whose period lies within the context, unless a number is given; 0 without FoPE."""
    scaling = text.section("rope_scaling") or text.section("rope_parameters")
    if scaling is None or not scaling.boolean("fope_sep_head", False):
        return 0
    for key in ("fope_num_inv_freq", "num_inv_freq"):
        if scaling.values.get(key) is not None:
            return scaling.integer(key, high=head_dim)
    theta = (scaling if "rope_theta" in scaling else text).number(
        "rope_theta", 5e6, low=2, high=1e12
    )
    least = tau / text.integer("max_position_embeddings", 128000, high=1 << 30)
    return sum(theta ** (-i / head_dim) > least for i in range(0, head_dim, 2))
