"""Qwen3-VL: Qwen2-VL's resizing with larger patches, and features of several depths.

``deepstack`` mergers turn the hidden states of some layers into further features of each image
token, which are added in the first layers of the language model. Pixel bounds are the checkpoint's
own: LMDeploy reads none from the images of a request. Those of a video are of all its frames.
"""

from __future__ import annotations

from math import isqrt
from typing import Final

from msgspec.structs import replace

from turbofit.core.images import PatchRule, VideoRule
from turbofit.core.model import VisionDims
from turbofit.model.config import Section
from turbofit.model.families.dims import CheckpointConfig, Dims, attention_heads
from turbofit.model.families.qwen_vl import read_rule
from turbofit.model.families.text import read_text

__all__ = ["read", "read_images", "read_vision"]

#: Bounds of Transformers' class, where no file has any: pixels of all frames.
_SMALLEST_VIDEO: Final = 128 * 32 * 32
_LARGEST_VIDEO: Final = 768 * 32 * 32


def read(parts: CheckpointConfig) -> Dims:
    """A Qwen3-VL, dense or with experts; absent keys take Transformers' defaults."""
    parts.warn_without_processor()
    config = parts.config
    inner = "Qwen3VLMoeTextModel" if "Moe" in parts.architecture else "Qwen3VLTextModel"
    section = config.section("text_config") or Section({}, f"{config.what}: text_config")
    tied = config.boolean("tie_word_embeddings", False)
    text = replace(read_text(section, inner), tie_word_embeddings=tied)
    vision = read_vision(config, text.hidden)
    return Dims(text, vision, read_images(parts, vision))


def read_images(parts: CheckpointConfig, vision: VisionDims) -> PatchRule:
    """The rule of images, and with it that of videos.

    A checkpoint without a video processor of its own lends it the image processor's settings, as
    Transformers does.
    """
    settings = parts.video or parts.processor
    size = settings.section("size") if settings else None
    size = size or Section({}, "video_preprocessor_config.json: size")
    video = VideoRule(
        merged_frames=vision.temporal_patch,
        min_pixels=size.integer("shortest_edge", _SMALLEST_VIDEO, high=1 << 32),
        max_pixels=size.integer("longest_edge", _LARGEST_VIDEO, high=1 << 32),
    )
    return replace(read_rule(parts.processor, vision), client_knobs=False, video=video)


def read_vision(config: Section, text_hidden: int) -> VisionDims:
    """The tower, with Transformers' defaults.

    Raises:
        UsageError: dims that contradict each other.
    """
    vision = config.section("vision_config") or Section({}, f"{config.what}: vision_config")
    hidden = vision.integer("hidden_size", 1152, high=1 << 16)
    heads = attention_heads(vision, "num_heads", hidden, 16)
    if vision.integer("out_hidden_size", 3584, high=1 << 18) != text_hidden:
        raise vision.error("out_hidden_size", f"is not the language model's {text_hidden}")
    positions = vision.integer("num_position_embeddings", 2304)
    if isqrt(positions) ** 2 != positions:
        raise vision.error("num_position_embeddings", f"{positions} is not a square")
    patch = vision.integer("patch_size", 16, high=1 << 10)
    deepstack = vision.integers("deepstack_visual_indexes")
    return VisionDims(
        kind="qwen3vit",
        layers=vision.integer("depth", 27, high=1 << 10),
        hidden=hidden,
        heads=heads,
        intermediate=vision.integer("intermediate_size", 4304, high=1 << 20),
        patch_size=patch,
        image_size=isqrt(positions) * patch,
        channels=vision.integer("in_channels", 3, high=64),
        temporal_patch=vision.integer("temporal_patch_size", 2, high=64),
        merge=vision.integer("spatial_merge_size", 2, high=16),
        deepstack=len(deepstack) if "deepstack_visual_indexes" in vision else 3,
    )
