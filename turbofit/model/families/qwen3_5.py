"""Qwen3.5: Qwen3-VL's tower and resizing, before a language model of gated delta nets.

Three of four layers have a delta net in place of attention. The tower has no ``deepstack``: a key
of that name is read by no engine. Checkpoints hold a draft of further tokens besides (``mtp``),
which neither LMDeploy nor Transformers loads with the model.
"""

from __future__ import annotations

from msgspec.structs import replace

from turbofit.model.config import Section
from turbofit.model.families.dims import CheckpointConfig, Dims
from turbofit.model.families.qwen3_vl import read_images, read_vision
from turbofit.model.families.text import read_text

__all__ = ["read"]


def read(parts: CheckpointConfig) -> Dims:
    """A Qwen3.5, dense or with experts; absent keys take Transformers' defaults.

    Intern-S2-Preview is one with experts, and a time series encoder that TurboMind does not load.
    """
    parts.warn_without_processor()
    config = parts.config
    dense = parts.architecture == "Qwen3_5ForConditionalGeneration"
    inner = "Qwen3_5TextModel" if dense else "Qwen3_5MoeTextModel"
    section = config.section("text_config") or Section({}, f"{config.what}: text_config")
    if not section.boolean("attn_output_gate", True):
        raise section.error("attn_output_gate", "is false, which no published Qwen3.5 has")
    tied = config.boolean("tie_word_embeddings", False)
    text = replace(read_text(section, inner), tie_word_embeddings=tied)
    if "attn_output_gate" not in section:
        parts.warnings.append(
            f"{section.what} lacks attn_output_gate: Transformers gates all the same, LMDeploy's"
            " PyTorch engine does not start"
        )
    vision = replace(read_vision(config, text.hidden), deepstack=0)
    return Dims(text, vision, read_images(parts, vision))
