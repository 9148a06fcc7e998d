"""Qwen2-VL and Qwen2.5-VL: an image is resized to whole windows of patches within pixel bounds."""

from __future__ import annotations

from typing import Final

from turbofit.core.images import PatchRule
from turbofit.core.model import VisionDims
from turbofit.model.config import Section
from turbofit.model.families.dims import CheckpointConfig, Dims, read_tower
from turbofit.model.families.text import read_text

_TOWER: Final = {
    "depth": 32, "num_heads": 16, "patch_size": 14, "in_channels": 3, "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}  # fmt: skip
#: Transformers' bounds in pixels, for checkpoints without a preprocessor config.
_SMALLEST_PIXELS: Final = 56 * 56
_LARGEST_PIXELS: Final = 28 * 28 * 1280

_PIXELS_BOUND: Final = 1 << 32


def read_vision(config: Section, text_hidden: int, *, second: bool) -> VisionDims:
    """Read the tower of Qwen2-VL, or of Qwen2.5-VL if ``second``.

    Missing keys take Transformers' defaults.

    Raises:
        UsageError: the tower's output is not as wide as the language model.
    """
    vision = config.part("vision_config")
    out = "out_hidden_size" if second else "hidden_size"
    vision.refuse_if(
        (width := vision.integer(out, 3584, high=1 << 18)) != text_hidden,
        out,
        f"{width} is not the language model's {text_hidden}",
    )
    if second:
        keys = {**_TOWER, "hidden_size": 3584, "intermediate_size": 3420}
        return read_tower(vision, keys, kind="qwen2_5vit", norm="rms_norm", gated_mlp=True)
    hidden = vision.integer("embed_dim", 1280, high=1 << 16)
    inter = int(hidden * vision.number("mlp_ratio", 4, low=0.1, high=64))
    return read_tower(vision, _TOWER, kind="qwen2vit", hidden=hidden, intermediate=inter)


def check_settings(values: Section, vision: VisionDims) -> None:
    """Refuse an image processor whose patch or window size differs from the tower's.

    Raises:
        UsageError: a setting contradicts the tower.
    """
    for key, expected in (("patch_size", vision.patch_size), ("merge_size", vision.merge)):
        values.refuse_if(
            values.integer(key, expected) != expected, key, f"is not the tower's {expected}"
        )


def read_rule(values: Section, vision: VisionDims) -> PatchRule:
    """Read the image rule; ``min_pixels``/``max_pixels`` win over ``size``, as in Transformers."""
    check_settings(values, vision)
    edges = values.part("size")
    return PatchRule(
        patch_size=vision.patch_size,
        merge=vision.merge,
        min_pixels=_pixels(values, "min_pixels", edges, "shortest_edge", _SMALLEST_PIXELS),
        max_pixels=_pixels(values, "max_pixels", edges, "longest_edge", _LARGEST_PIXELS),
    )


def _pixels(values: Section, key: str, edges: Section, edge: str, default: int) -> int:
    """Return a bound on pixels: the value at ``key``, else at ``edge``, else the default."""
    if key in values:
        return values.integer(key, high=_PIXELS_BOUND)
    return edges.integer(edge, default, high=_PIXELS_BOUND)


def read(parts: CheckpointConfig) -> Dims:
    """Read a Qwen2-VL or Qwen2.5-VL."""
    config = parts.config
    tied = config.boolean("tie_word_embeddings", False)
    text = read_text(config.section("text_config") or config, "Qwen2VLTextModel", tied=tied)
    vision = read_vision(config, text.hidden, second=parts.architecture.startswith("Qwen2_5"))
    return Dims(text, vision, read_rule(parts.images, vision))
