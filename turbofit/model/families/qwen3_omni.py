"""Qwen3-Omni's thinker: Qwen3-VL with experts, and a tower for sound beside that of images.

LMDeploy loads both towers and neither talker nor vocoder. Sound and videos are planned for by
nobody yet: the gateway takes none.
"""

from __future__ import annotations

from msgspec.structs import replace

from turbofit.core.model import AudioDims
from turbofit.model.config import Section
from turbofit.model.families.dims import CheckpointConfig, Dims, attention_heads
from turbofit.model.families.qwen3_vl import read_vision
from turbofit.model.families.qwen_vl import read_rule
from turbofit.model.families.text import read_text

__all__ = ["read"]


def read(parts: CheckpointConfig) -> Dims:
    """A Qwen3OmniMoeForConditionalGeneration; absent keys take Transformers' defaults."""
    parts.warn_without_processor()
    what = parts.config.what
    thinker = parts.config.section("thinker_config") or Section({}, f"{what}: thinker_config")
    section = thinker.section("text_config") or Section({}, f"{what}: text_config")
    if thinker.boolean("tie_word_embeddings", False):
        raise thinker.error("tie_word_embeddings", "is true, which LMDeploy does not read")
    text = read_text(section, "Qwen3OmniMoeTextModel", tied=False)
    vision = replace(read_vision(thinker, text.hidden), audio=_audio(thinker, text.hidden))
    return Dims(text, vision, replace(read_rule(parts.processor, vision), client_knobs=False))


def _audio(thinker: Section, text_hidden: int) -> AudioDims:
    audio = thinker.section("audio_config") or Section({}, f"{thinker.what}: audio_config")
    hidden = audio.integer("d_model", 1280, high=1 << 16)
    if audio.integer("output_dim", 3584, high=1 << 18) != text_hidden:
        raise audio.error("output_dim", f"is not the language model's {text_hidden}")
    return AudioDims(
        layers=audio.integer("encoder_layers", 32, high=1 << 10),
        hidden=hidden,
        heads=attention_heads(audio, "encoder_attention_heads", hidden, 20),
        intermediate=audio.integer("encoder_ffn_dim", 5120, high=1 << 20),
        channels=audio.integer("downsample_hidden_size", 480, high=1 << 16),
        mel_bins=audio.integer("num_mel_bins", 128, high=1 << 12),
        positions=audio.integer("max_source_positions", 1500, high=1 << 20),
    )
