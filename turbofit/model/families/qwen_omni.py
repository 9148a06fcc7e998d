"""The thinkers of Qwen2.5-Omni and Qwen3-Omni: a Qwen-VL with an additional audio tower.

Engines load both towers, but neither talker nor vocoder. Plans count neither sound nor videos, and
the gateway refuses both.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from turbofit.core.images import PatchRule
from turbofit.core.model import AudioDims, VisionDims
from turbofit.model.config import Section
from turbofit.model.families import qwen3_vl, qwen_vl
from turbofit.model.families.dims import CheckpointConfig, Dims, tied_text
from turbofit.model.families.text import read_text

#: The architecture of a thinker alone, whose config.json is a whole model's ``thinker_config``.
_ALONE: Final = "Qwen2_5OmniThinkerForConditionalGeneration"


def read(parts: CheckpointConfig) -> Dims:
    """Read a Qwen3OmniMoeForConditionalGeneration; missing keys take Transformers' defaults."""
    thinker = parts.config.part("thinker_config")
    thinker.refuse_if(
        thinker.boolean("tie_word_embeddings", False),
        "tie_word_embeddings",
        "is true, which LMDeploy does not read",
    )
    text = read_text(thinker.part("text_config"), "Qwen3OmniMoeTextModel", tied=False)
    section = thinker.part("audio_config")
    channels = section.integer("downsample_hidden_size", 480, high=1 << 16)
    audio = replace(_audio(section, text.hidden), channels=channels)
    vision = replace(qwen3_vl.read_vision(thinker, text.hidden), audio=audio)
    return Dims(text, vision, _rule(parts, vision))


def read_qwen2_5(parts: CheckpointConfig) -> Dims:
    """Read a Qwen2.5-Omni, whole or only its thinker; missing keys take Transformers' defaults.

    The thinker's config decides whether the head is tied; the language model's config does not.
    """
    alone = parts.architecture == _ALONE
    thinker = parts.config if alone else parts.config.part("thinker_config")
    text = tied_text(thinker, "Qwen2_5OmniTextModel")
    audio = _audio(thinker.part("audio_config"), text.hidden)
    vision = replace(qwen_vl.read_vision(thinker, text.hidden, second=True), audio=audio)
    return Dims(text, vision, _rule(parts, vision))


def _rule(parts: CheckpointConfig, vision: VisionDims) -> PatchRule:
    return replace(qwen_vl.read_rule(parts.images, vision), client_knobs=False)


def _audio(audio: Section, text_hidden: int) -> AudioDims:
    """Read the audio tower; missing keys take Transformers' defaults."""
    hidden = audio.integer("d_model", 1280, high=1 << 16)
    audio.refuse_if(
        audio.integer("output_dim", 3584, high=1 << 18) != text_hidden,
        "output_dim",
        f"is not the language model's {text_hidden}",
    )
    return AudioDims(
        layers=audio.integer("encoder_layers", 32, high=1 << 10),
        hidden=hidden,
        heads=audio.divisor("encoder_attention_heads", hidden, "channels", 20),
        intermediate=audio.integer("encoder_ffn_dim", 5120, high=1 << 20),
        mel_bins=audio.integer("num_mel_bins", 128, high=1 << 12),
        positions=audio.integer("max_source_positions", 1500, high=1 << 20),
    )
