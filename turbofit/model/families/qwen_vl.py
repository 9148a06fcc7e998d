"""Qwen2-VL and Qwen2.5-VL: an image is resized to whole windows of patches within pixel bounds.

A window is ``merge`` x ``merge`` patches, 28 x 28 pixels in all published models; it becomes one
token of the language model.
"""

from __future__ import annotations

from math import ceil, floor, isqrt, sqrt
from typing import Final

from turbofit.core.errors import UsageError
from turbofit.core.model import PatchRule, VisionDims
from turbofit.model.config import Section
from turbofit.model.families.dims import Dims, Parts
from turbofit.model.families.text import read_text

__all__ = ["patches", "read", "read_rule", "read_vision", "windows", "worst_patches"]

#: Transformers' bounds where a checkpoint has no preprocessor config, in pixels.
_SMALLEST_PIXELS: Final = 56 * 56
_LARGEST_PIXELS: Final = 28 * 28 * 1280

_PIXELS_BOUND: Final = 1 << 32

#: The preprocessor refuses images whose longer side is more than this many times the shorter.
LARGEST_RATIO: Final = 200


def patches(rule: PatchRule, width: int, height: int, largest: int, smallest: int) -> int:
    """Vision patches of one image.

    Args:
        rule: the model's rule.
        width: pixels, at least 1.
        height: pixels, at least 1.
        largest: upper bound on the pixels after resizing.
        smallest: lower bound.

    Raises:
        UsageError: longer than 200 : 1, as the preprocessor itself refuses it.

    GLM-4.1V's rule differs by ``enlarge`` alone, once its bounds are those of one frame.
    """
    window = rule.patch_size * rule.merge
    rows, columns = windows(
        width, height, window, largest, smallest, enlarge=rule.enlarge, what="image"
    )
    return rows * columns * rule.merge**2


def windows(
    width: int, height: int, window: int, largest: int, smallest: int, *, enlarge: bool, what: str,
    frames: int = 1, judged: int = 1,
) -> tuple[int, int]:  # fmt: skip
    """Rows and columns of windows that an image, or each frame of a video, is resized to.

    Args:
        width: pixels, at least 1.
        height: pixels, at least 1.
        window: pixels of a window's side.
        largest: upper bound on the pixels after resizing, of all frames.
        smallest: lower bound.
        enlarge: whether a side below a window is enlarged before anything else.
        what: ``image`` or ``video``, for words.
        frames: that share the bounds.
        judged: as how many of them the bounds are tried first.

    Raises:
        UsageError: longer than 200 : 1, as the preprocessor itself refuses it.
    """
    if enlarge and min(width, height) < window:
        scale = max(window / height, window / width)
        width, height = int(width * scale), int(height * scale)
    if max(width, height) / min(width, height) > LARGEST_RATIO:
        raise UsageError(
            f"{'an' if what == 'image' else 'a'} {what} of {width}x{height} is longer than"
            f" {LARGEST_RATIO}:1",
            hint=f"the model's own preprocessor refuses such {what}s: crop it",
        )
    rows, columns = round(height / window), round(width / window)
    pixels = judged * rows * columns * window * window
    if pixels > largest:
        shrink = sqrt((frames * height * width) / largest)
        rows = max(1, floor(height / shrink / window))
        columns = max(1, floor(width / shrink / window))
    elif pixels < smallest:
        grow = sqrt(smallest / (frames * height * width))
        rows, columns = ceil(height * grow / window), ceil(width * grow / window)
    return rows, columns


def worst_patches(rule: PatchRule, largest: int, smallest: int) -> int:
    """An upper bound on the patches of any image that the preprocessor accepts.

    It is exact where the largest number of windows is a grid no longer than 200 : 1 (16,384 in the
    published models is 128 x 128), else a fraction of a percent high. Bounds below about 157,000
    pixels are exceeded by long strips, since a strip keeps one window of height; ``smallest`` near
    ``largest`` lets rounding up exceed it. Both are covered.
    """
    window = rule.patch_size * rule.merge
    area = window * window
    most = max(1, largest // area)
    if largest < LARGEST_RATIO * area:
        most = max(most, isqrt(LARGEST_RATIO * largest) // window)
    strip = sqrt(smallest / LARGEST_RATIO) + sqrt(LARGEST_RATIO * smallest)
    most = max(most, floor(smallest / area + strip / window + 1 + 1e-6))
    return most * rule.merge**2


def read_vision(config: Section, text_hidden: int, *, second: bool) -> VisionDims:
    """The tower of Qwen2-VL or, where ``second``, of Qwen2.5-VL; Transformers' defaults.

    Raises:
        UsageError: dims that contradict each other.
    """
    vision = config.section("vision_config") or Section({}, f"{config.what}: vision_config")
    if second:
        hidden = vision.integer("hidden_size", 3584, high=1 << 16)
        inter = vision.integer("intermediate_size", 3420, high=1 << 20)
        out = vision.integer("out_hidden_size", 3584, high=1 << 18)
    else:
        hidden = vision.integer("embed_dim", 1280, high=1 << 16)
        inter = int(hidden * vision.number("mlp_ratio", 4, low=0.1, high=64))
        out = vision.integer("hidden_size", 3584, high=1 << 18)
    if out != text_hidden:
        raise vision.error(
            "out_hidden_size" if second else "hidden_size",
            f"{out} is not the language model's {text_hidden}",
        )
    heads = vision.integer("num_heads", 16, high=1 << 12)
    if hidden % heads:
        raise vision.error("num_heads", f"{heads} does not divide {hidden} channels")
    return VisionDims(
        kind="qwen2_5vit" if second else "qwen2vit",
        layers=vision.integer("depth", 32, high=1 << 10),
        hidden=hidden,
        heads=heads,
        intermediate=inter,
        patch_size=vision.integer("patch_size", 14, high=1 << 10),
        channels=vision.integer("in_channels", 3, high=64),
        temporal_patch=vision.integer("temporal_patch_size", 2, high=64),
        merge=vision.integer("spatial_merge_size", 2, high=16),
        norm="rms_norm" if second else "layer_norm",
        gated_mlp=second,
    )


def read_rule(processor: Section | None, vision: VisionDims) -> PatchRule:
    """The image rule; a bare ``min_pixels``/``max_pixels`` wins over ``size``, as upstream."""
    values = processor or Section({}, "preprocessor_config.json")
    edges = values.section("size") or Section({}, f"{values.what}: size")
    for key, own in (("patch_size", vision.patch_size), ("merge_size", vision.merge)):
        if values.integer(key, own) != own:
            raise values.error(key, f"is not the tower's {own}")
    return PatchRule(
        patch_size=vision.patch_size,
        merge=vision.merge,
        min_pixels=_pixels(values, "min_pixels", edges, "shortest_edge", _SMALLEST_PIXELS),
        max_pixels=_pixels(values, "max_pixels", edges, "longest_edge", _LARGEST_PIXELS),
    )


def _pixels(values: Section, key: str, edges: Section, edge: str, default: int) -> int:
    if key in values:
        return values.integer(key, high=_PIXELS_BOUND)
    return edges.integer(edge, default, high=_PIXELS_BOUND)


def read(parts: Parts) -> Dims:
    """A Qwen2-VL or Qwen2.5-VL."""
    parts.warn_without_processor()
    config = parts.config
    tied = config.boolean("tie_word_embeddings", False)
    text = read_text(config.section("text_config") or config, "Qwen2VLTextModel", tied=tied)
    vision = read_vision(config, text.hidden, second=parts.architecture.startswith("Qwen2_5"))
    return Dims(text, vision, read_rule(parts.processor, vision))
