"""Pictures that no parameter of a request can hold down: the size to give them instead.

Where LMDeploy reads no limit for an image (InternVL in the Transformers format, LLaVA's grids, any
model through the Messages API), the picture itself is resized, to what the preprocessor would have
resized it to under the limit.
"""

from __future__ import annotations

from typing import Final

from turbofit.core.errors import UsageError
from turbofit.core.model import (
    AnyresRule,
    CanvasRule,
    CrossRule,
    HdRule,
    ImageRule,
    PatchRule,
    TileRule,
)
from turbofit.model.families import internvl, qwen_vl
from turbofit.model.images import limit_bounds, units, worst_units

__all__ = ["size_within"]

_REFUSED: Final = 1 << 62


def size_within(
    rule: ImageRule, size: tuple[int, int], limit: int, default: int
) -> tuple[int, int] | None:
    """Width and height with which an image takes at ``default`` what it would take at ``limit``.

    Args:
        rule: the model's rule.
        size: of the image.
        limit: tiles or pixels.
        default: what the preprocessor will hold the image to, tiles or pixels.

    Returns:
        None where the image takes no more as it is, and where no size takes less. Where only a
        size that takes somewhat more than at ``limit`` is found, that one.

    Raises:
        UsageError: a size that the preprocessor refuses.
    """
    before = units(rule, *size, **limit_bounds(rule, default))
    if isinstance(rule, TileRule) and (not rule.dynamic or isinstance(rule, CrossRule | HdRule)):
        return None  # each image takes the same
    if isinstance(rule, AnyresRule | CanvasRule):
        # Neither stretches an image: a smaller one of the same shape has a smaller grid.
        goal = worst_units(rule, max_dynamic_patch=limit)
        return _scaled(rule, size, goal, default) if before > goal else None
    goal = units(rule, *size, **limit_bounds(rule, limit))
    if before <= goal:
        return None
    found = _stretched(rule, size, limit)
    if _count(rule, found, default) <= goal:
        return found
    # What is below the least size is enlarged again: the nearest that is to be had.
    both = [one for one in (found, _scaled(rule, size, goal, default)) if one is not None]
    best = min(both, key=lambda one: _count(rule, one, default))
    return best if _count(rule, best, default) < before else None


def _stretched(rule: TileRule | PatchRule, size: tuple[int, int], limit: int) -> tuple[int, int]:
    """The size that the preprocessor itself gives an image under the limit."""
    if isinstance(rule, TileRule):
        return internvl.grid_size(rule, *size, limit)
    window = rule.patch_size * rule.merge
    least = min(rule.min_pixels, limit)
    rows, columns = qwen_vl.windows(*size, window, limit, least, enlarge=rule.enlarge, what="image")
    return columns * window, rows * window


def _scaled(
    rule: ImageRule, size: tuple[int, int], goal: int, default: int
) -> tuple[int, int] | None:
    """The largest size found of the image's own shape that takes no more than ``goal`` units."""
    longer = max(size)

    def at(side: int) -> tuple[int, int]:
        width, height = (-(-edge * side // longer) for edge in size)  # never a longer shape
        return width, height

    low, high = 0, longer
    while low < high:
        middle = (low + high + 1) // 2
        if _count(rule, at(middle), default) <= goal:
            low = middle
        else:
            high = middle - 1
    return at(low) if low else None


def _count(rule: ImageRule, size: tuple[int, int], limit: int) -> int:
    """Units of an image; more than any limit where rounding made it too long a strip."""
    try:
        return units(rule, *size, **limit_bounds(rule, limit))
    except UsageError:
        return _REFUSED
