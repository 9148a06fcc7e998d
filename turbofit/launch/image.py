"""A worst-case image, made without an imaging library."""

from __future__ import annotations

import struct
import zlib
from math import isqrt
from typing import TYPE_CHECKING

from turbofit.core.images import AnyresRule, CrossRule, HdRule
from turbofit.core.images.base_tile import BaseTileRule
from turbofit.model.images import limits_down, units

if TYPE_CHECKING:
    from turbofit.core.images import ImageRule
    from turbofit.core.plan import Plan

__all__ = ["flat_png", "knobs", "worst_size"]


def worst_size(plan: Plan) -> tuple[int, int] | None:
    """Width and height of an image that takes the units the plan allows for one.

    None for a model without images; of sizes that reach the same, the first found.
    """
    rule, limits = plan.model.image_rule, plan.limits
    if rule is None or limits.vision_unit is None:
        return None
    if plan.workload.image_size is not None:
        return plan.workload.image_size
    best, found = None, 0
    for size in _sizes(rule, limits.max_dynamic_patch, limits.max_pixels_per_image):
        got = units(
            rule,
            *size,
            max_dynamic_patch=limits.max_dynamic_patch,
            max_pixels=limits.max_pixels_per_image,
        )
        if found < got <= limits.units_per_image:
            best, found = size, got
    return best


def knobs(plan: Plan) -> dict[str, int]:
    """Fields of an image part that hold LMDeploy to the plan's limit, whatever its default.

    Qwen2-VL's ``max_pixels`` counts only together with ``min_pixels`` on some Transformers.
    """
    rule, limits = plan.model.image_rule, plan.limits
    if isinstance(rule, BaseTileRule):
        if limits.max_dynamic_patch is None or not rule.client_knobs:
            return {}
        return {"max_dynamic_patch": limits.max_dynamic_patch}
    if rule is None or not rule.client_knobs or limits.max_pixels_per_image is None:
        return {}
    most = limits.max_pixels_per_image
    return {"min_pixels": min(rule.min_pixels, most), "max_pixels": most}


def flat_png(width: int, height: int) -> bytes:
    """A black PNG of one bit a pixel, so that the largest image is a few kilobytes."""
    row = b"\0" + b"\0" * (-(-width // 8))
    data = zlib.compress(row * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )


def _sizes(rule: ImageRule, patch: int | None, pixels: int | None) -> list[tuple[int, int]]:
    """Candidates: every grid of tiles at its own size, or rectangles just within the pixels.

    Most units first, and of those the nearest to a square.
    """
    if isinstance(rule, AnyresRule):
        return [rule.worst_size(limit) for limit in limits_down(rule) if limit <= (patch or limit)]
    if isinstance(rule, HdRule):
        return [(rule.tile_size, rule.tile_size * (patch or rule.max_dynamic_patch))]
    if isinstance(rule, CrossRule):
        return [(rule.tile_size, rule.tile_size)]
    if isinstance(rule, BaseTileRule):
        most, side = patch or rule.max_dynamic_patch, rule.tile_size
        grids = [
            (columns, count // columns)
            for count in range(1, most + 1)
            for columns in range(1, count + 1)
            if count % columns == 0
        ]
        grids.sort(key=lambda grid: (-grid[0] * grid[1], abs(grid[0] - grid[1]), -grid[0]))
        return [(side * columns, side * rows) for columns, rows in grids]
    side = rule.patch_size * rule.merge
    windows = (pixels or rule.max_pixels) // side**2
    square = max(1, isqrt(windows))
    # The preprocessor refuses images longer than 200 : 1.
    return [
        (side * (windows // rows), side * rows)
        for rows in range(square, max(0, square - 64), -1)
        if 0 < windows // rows <= 200 * rows
    ]
