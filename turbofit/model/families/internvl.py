"""InternVL: an image becomes a grid of square tiles of the nearest aspect, and a thumbnail."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from turbofit.core.images import TileRule
from turbofit.core.images.base_tile import LARGEST_PATCH_LIMIT
from turbofit.core.model import VisionDims
from turbofit.model.config import Section
from turbofit.model.families.dims import (
    CheckpointConfig,
    Dims,
    inner_text,
    read_tower,
    whole_windows,
)

#: The tower's defaults in the checkpoints' remote code.
_CHAT_TOWER: Final = {
    "hidden_size": 3200, "num_hidden_layers": 48, "num_attention_heads": 25,
    "intermediate_size": 12800, "image_size": 224, "patch_size": 14, "num_channels": 3,
}  # fmt: skip
#: The tower's defaults in Transformers' class.
_HF_TOWER: Final = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096, "image_size": 448, "patch_size": 14, "num_channels": 3,
}  # fmt: skip


def _tower(section: Section, defaults: dict[str, int], merge: int, norm: str) -> VisionDims:
    section.refuse_if(
        norm not in {"layer_norm", "rms_norm"},
        "norm_type",
        f"{norm[:40]!r} is neither layer_norm nor rms_norm",
    )
    tower = read_tower(section, defaults, kind="internvit", merge=merge, norm=norm)
    return whole_windows(section, tower)


def _merge(config: Section) -> int:
    """Return how many patches along a side become one token: 1 / ``downsample_ratio``."""
    ratio = config.number("downsample_ratio", 0.5, low=0.05, high=1.0)
    config.refuse_if(
        abs(round(1 / ratio) * ratio - 1) > 1e-6,
        "downsample_ratio",
        f"{ratio} is not one over a whole number",
    )
    return round(1 / ratio)


def read_chat(parts: CheckpointConfig) -> Dims:
    """Read an InternVLChatModel, the format of OpenGVLab's own repositories.

    A checkpoint with ``ps_version`` v1 is refused, since LMDeploy's PyTorch engine shuffles pixels
    as in v2. Without a preprocessor config, LMDeploy makes tiles even if ``dynamic_image_size`` is
    false.
    """
    config = parts.config
    text = inner_text(config.required("llm_config"), parts.architecture)
    config.refuse_if(
        config.string("ps_version", "v1") != "v2",
        "ps_version",
        "is not v2, the only one that LMDeploy runs",
    )
    section = config.required("vision_config")
    vision = replace(
        _tower(section, _CHAT_TOWER, _merge(config), section.string("norm_type", "rms_norm")),
        qkv_bias=section.boolean("qkv_bias", False),
        qk_norm=section.boolean("qk_normalization", True),
    )
    size = vision.image_size or 0
    forced = config.integer("force_image_size", size, high=1 << 14)
    config.refuse_if(
        forced != size,
        "force_image_size",
        f"{forced} differs from the tower's {size}, which TurboMind takes",
    )
    rule = TileRule(
        tile_size=size,
        tokens_per_tile=(size // vision.patch_size // vision.merge) ** 2,
        max_dynamic_patch=config.integer("max_dynamic_patch", 6, high=LARGEST_PATCH_LIMIT),
        min_dynamic_patch=config.integer("min_dynamic_patch", 1, high=LARGEST_PATCH_LIMIT),
        thumbnail=config.boolean("use_thumbnail", False),
        dynamic=config.boolean("dynamic_image_size", False) or parts.processor is None,
    )
    return Dims(text, vision, rule)


def read_hf(parts: CheckpointConfig) -> Dims:
    """Read an InternVLForConditionalGeneration (the Transformers format) or an Intern-S1.

    LMDeploy always cuts the images of such a model into tiles. No field of a request changes the
    largest number of tiles.
    """
    config, values = parts.config, parts.images
    text = inner_text(config.required("text_config"), parts.architecture)
    section = config.part("vision_config")
    vision = replace(
        _tower(section, _HF_TOWER, _merge(config), section.string("norm_type", "layer_norm")),
        qkv_bias=section.boolean("attention_bias", False),
        qk_norm=section.boolean("use_qk_norm", False),
    )
    size, tokens = vision.image_size or 0, (vision.image_size or 0) // vision.patch_size
    expected = (tokens // vision.merge) ** 2
    config.refuse_if(
        config.integer("image_seq_length", 256) != expected,
        "image_seq_length",
        f"is not the {expected} tokens of a tile",
    )
    edges = values.part("size")
    edges.refuse_if(
        {edges.integer("height", size), edges.integer("width", size)} != {size},
        "height",
        f"and width are not the tower's {size}",
    )
    rule = TileRule(
        tile_size=size,
        tokens_per_tile=expected,
        max_dynamic_patch=values.integer("max_patches", 12, high=LARGEST_PATCH_LIMIT),
        min_dynamic_patch=values.integer("min_patches", 1, high=LARGEST_PATCH_LIMIT),
        client_knobs=False,
    )
    return Dims(text, vision, rule)
