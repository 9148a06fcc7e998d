"""Qwen3-VL, Qwen3.5 and Intern-S1-Pro: Qwen2-VL's resizing with larger patches.

``deepstack`` mergers turn the hidden states of some tower layers into further features of each
image token. The first layers of the language model add these features to their hidden states. The
checkpoint sets the bounds on an image's pixels; LMDeploy reads no bounds from a request. The bounds
of a video are for all its frames together.

Qwen3.5 has no ``deepstack``: engines ignore a key of that name. Three of four layers of its
language model have a gated delta net in place of attention. Checkpoints also contain a draft model
(``mtp``), which neither LMDeploy nor Transformers loads. Intern-S1-Pro has experts, and Fourier
position encoding; plans count none of its videos.
"""

from __future__ import annotations

from math import isqrt, tau
from typing import Final

from msgspec.structs import replace

from turbofit.core.images import PatchRule, VideoRule
from turbofit.core.model import VisionDims
from turbofit.model.config import Section
from turbofit.model.families.dims import CheckpointConfig, Dims, read_tower, tied_text
from turbofit.model.families.qwen_vl import read_rule

_TOWER: Final = {
    "depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304, "patch_size": 16,
    "in_channels": 3, "temporal_patch_size": 2, "spatial_merge_size": 2,
}  # fmt: skip
#: Transformers' bounds for checkpoints without bounds: the pixels of all frames together.
_SMALLEST_VIDEO: Final = 128 * 32 * 32
_LARGEST_VIDEO: Final = 768 * 32 * 32


def read(parts: CheckpointConfig) -> Dims:
    """Read a Qwen3-VL, dense or with experts; missing keys take Transformers' defaults."""
    config = parts.config
    inner = "Qwen3VLMoeTextModel" if "Moe" in parts.architecture else "Qwen3VLTextModel"
    text = tied_text(config, inner)
    vision = read_vision(config, text.hidden)
    return Dims(text, vision, _images(parts, vision))


def _images(parts: CheckpointConfig, vision: VisionDims) -> PatchRule:
    """Read the rules for images and videos.

    Without a video processor, Transformers uses the image processor's settings.
    """
    size = (parts.video or parts.images).part("size")
    video = VideoRule(
        merged_frames=vision.temporal_patch,
        min_pixels=size.integer("shortest_edge", _SMALLEST_VIDEO, high=1 << 32),
        max_pixels=size.integer("longest_edge", _LARGEST_VIDEO, high=1 << 32),
    )
    return replace(read_rule(parts.images, vision), client_knobs=False, video=video)


def read_vision(config: Section, text_hidden: int) -> VisionDims:
    """Read the tower; missing keys take Transformers' defaults.

    Raises:
        UsageError: sizes in the tower are contradictory, or do not fit the language model.
    """
    vision = config.part("vision_config")
    vision.refuse_if(
        vision.integer("out_hidden_size", 3584, high=1 << 18) != text_hidden,
        "out_hidden_size",
        f"is not the language model's {text_hidden}",
    )
    positions = vision.integer("num_position_embeddings", 2304)
    vision.refuse_if(
        isqrt(positions) ** 2 != positions,
        "num_position_embeddings",
        f"{positions} is not a square",
    )
    deepstack = vision.integers("deepstack_visual_indexes")
    tower = read_tower(
        vision, _TOWER, kind="qwen3vit",
        deepstack=len(deepstack) if "deepstack_visual_indexes" in vision else 3,
    )  # fmt: skip
    return replace(tower, image_size=isqrt(positions) * tower.patch_size)


def read_qwen3_5(parts: CheckpointConfig) -> Dims:
    """Read a Qwen3.5, dense or with experts; missing keys take Transformers' defaults.

    Intern-S2-Preview is a Qwen3.5 with experts; TurboMind does not load its time series encoder.
    """
    config = parts.config
    dense = parts.architecture == "Qwen3_5ForConditionalGeneration"
    inner = "Qwen3_5TextModel" if dense else "Qwen3_5MoeTextModel"
    section = config.part("text_config")
    section.refuse_if(
        not section.boolean("attn_output_gate", True),
        "attn_output_gate",
        "is false, which no published Qwen3.5 has",
    )
    text = tied_text(config, inner)
    if "attn_output_gate" not in section:
        parts.warnings.append(
            f"{section.what} lacks attn_output_gate: Transformers has the gate even so, LMDeploy's"
            " PyTorch engine does not start"
        )
    vision = replace(read_vision(config, text.hidden), deepstack=0)
    return Dims(text, vision, _images(parts, vision))


def read_intern_s1_pro(parts: CheckpointConfig) -> Dims:
    """Read an InternS1ProForConditionalGeneration; missing keys take its class's defaults.

    A checkpoint with a tower for time series (``ts_config``) is refused.
    """
    config = parts.config
    config.refuse_if(
        "ts_config" in config,
        "ts_config",
        "is a tower for time series: turbofit has no account of it",
    )
    section = config.part("text_config")
    text = tied_text(config, "Qwen3VLMoeTextModel")
    text = replace(text, fourier=_frequencies(section, text.head_dim))
    inner = config.part("vision_config")
    inner.refuse_if(
        inner.integers("deepstack_visual_indexes"),
        "deepstack_visual_indexes",
        "is given, and LMDeploy drops its features",
    )
    vision = replace(read_vision(config, text.hidden), deepstack=0)
    return Dims(text, vision, replace(read_rule(parts.images, vision), client_knobs=False))


def _frequencies(text: Section, head_dim: int) -> int:
    """Return the number of frequencies of the Fourier position encoding; 0 if the model has none.

    If the config has no number, ``rope_theta`` and the longest context determine it.
    """
    scaling = text.section("rope_scaling") or text.section("rope_parameters")
    if scaling is None or not scaling.boolean("fope_sep_head", False):
        return 0
    for key in ("fope_num_inv_freq", "num_inv_freq"):
        if scaling.values.get(key) is not None:
            return scaling.integer(key, high=head_dim)
    theta = (scaling if "rope_theta" in scaling else text).number(
        "rope_theta", 5e6, low=2, high=1e12
    )
    # Waves that are longer than the longest context are left out.
    least = tau / text.integer("max_position_embeddings", 128000, high=1 << 30)
    return sum(theta ** (-i / head_dim) > least for i in range(0, head_dim, 2))
