"""LLaVA-NeXT and OneVision: an image is fitted into the best of a list of grids of tiles.

A smaller copy of the whole image is one tile more. The grid that loses least of the image's own
resolution wins, and of equally good ones the one with least padding. Tokens that lie wholly in the
padding are cut off again, so that an image gives fewer tokens than its tiles.
"""

from __future__ import annotations

from math import sqrt
from typing import Final

from turbofit.core.model import AnyresRule, VisionDims
from turbofit.model.config import Section

__all__ = [
    "grids_within",
    "least_tokens",
    "most_tokens",
    "read_grids",
    "tiles",
    "tokens",
    "widest",
    "worst_tiles",
]

Grid = tuple[int, int]

#: Tokens are resampled only where there are 1.1 times as many a side as ``most_tiles`` have.
_SLACK: Final = 1.1
_MOST_GRIDS: Final = 512


def grids_within(rule: AnyresRule, limit: int) -> tuple[Grid, ...]:
    """The grids of at most ``limit`` tiles; the single tile where the list has none so small.

    These are what a lowered limit leaves of ``image_grid_pinpoints``.
    """
    kept = tuple(grid for grid in rule.grids if _count(rule, grid) <= limit)
    return kept or ((rule.tile_size, rule.tile_size),)


def tiles(rule: AnyresRule, width: int, height: int, limit: int) -> int:
    """Tiles of one image, the whole image's own included."""
    return _count(rule, _best(grids_within(rule, limit), width, height)) + 1


def worst_tiles(rule: AnyresRule, limit: int) -> int:
    """The most tiles of any image; exact: an image of a grid's own size is fitted into it."""
    return max(_count(rule, grid) for grid in grids_within(rule, limit)) + 1


def widest(rule: AnyresRule, limit: int) -> Grid:
    """Width and height of an image that has the most tiles, and of these the most tokens."""

    def rank(size: Grid) -> tuple[int, int]:
        return tiles(rule, size[0], size[1], limit), tokens(rule, size[0], size[1], limit)

    return max(((wide, high) for high, wide in grids_within(rule, limit)), key=rank)


def tokens(rule: AnyresRule, width: int, height: int, limit: int) -> int:
    """Tokens of the language model for one image, exactly: padding is cut off, lines are ended."""
    grid = _best(grids_within(rule, limit), width, height)
    side = _side(rule)
    rows, columns = side * (grid[0] // rule.tile_size), side * (grid[1] // rule.tile_size)
    if width / height > columns / rows:
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    return rule.tokens_per_tile + _packed(rule, rows, columns)


def most_tokens(rule: AnyresRule, units: int) -> int:
    """An upper bound on the tokens of an image of so many tiles: no padding is cut off.

    Exact for an image of its grid's own shape. Resampled ones are bounded by 1.1 squared times
    ``most_tiles``, where none is cut off.
    """
    side, most = _side(rule), 0
    for height, width in (*rule.grids, (rule.tile_size, rule.tile_size)):
        rows, columns = side * (height // rule.tile_size), side * (width // rule.tile_size)
        if _count(rule, (height, width)) > units - 1:
            continue
        full = _packed(rule, rows, columns)
        if rule.most_tiles and rows * columns > _SLACK**2 * rule.most_tiles * side**2:
            # Cutting padding off may bring the image just below where resampling begins.
            full = max(full, int(_SLACK**2 * rule.most_tiles * side**2) + rows)
        most = max(most, full)
    return rule.tokens_per_tile + most


def least_tokens(rule: AnyresRule) -> int:
    """Tokens that no image has fewer of: the whole image's tile."""
    return rule.tokens_per_tile


def read_grids(config: Section, processor: Section | None, vision: VisionDims) -> tuple[Grid, ...]:
    """``image_grid_pinpoints``, which the model and its processor must agree on.

    Raises:
        UsageError: none, too many, or sizes that are not whole tiles.
    """
    own = _pinpoints(config, vision)
    if processor is not None and "image_grid_pinpoints" in processor:
        theirs = _pinpoints(processor, vision)
        if own and theirs != own:
            raise processor.error("image_grid_pinpoints", "differ from config.json's")
        own = own or theirs
    return own


def _pinpoints(section: Section, vision: VisionDims) -> tuple[Grid, ...]:
    values, side = section.values.get("image_grid_pinpoints"), vision.image_size or 1
    if values is None:
        return ()
    if not isinstance(values, list) or not 0 < len(values) <= _MOST_GRIDS:
        raise section.error("image_grid_pinpoints", "is not a list of sizes")
    grids = []
    for value in values:
        sizes = value if isinstance(value, list) and len(value) == 2 else [0, 0]
        if not all(type(size) is int and 0 < size <= 1 << 16 for size in sizes):
            raise section.error("image_grid_pinpoints", "is not a list of pairs of pixels")
        if sizes[0] % side or sizes[1] % side:
            raise section.error("image_grid_pinpoints", f"are not whole tiles of {side} pixels")
        grids.append((sizes[0], sizes[1]))
    return tuple(grids)


def _count(rule: AnyresRule, grid: Grid) -> int:
    return (grid[0] // rule.tile_size) * (grid[1] // rule.tile_size)


def _side(rule: AnyresRule) -> int:
    """Tokens along a side of a tile."""
    return round(sqrt(rule.tokens_per_tile))


def _best(grids: tuple[Grid, ...], width: int, height: int) -> Grid:
    """The grid that an image is fitted into, floating point included."""
    best, kept, wasted = grids[0], 0, float("inf")
    for grid in grids:
        scale = min(grid[1] / width, grid[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = grid[0] * grid[1] - effective
        if effective > kept or (effective == kept and waste < wasted):
            best, kept, wasted = grid, effective, waste
    return best


def _packed(rule: AnyresRule, rows: int, columns: int) -> int:
    """Tokens of the grid's own tiles: a token more a line, and resampled where there are many."""
    if rule.most_tiles:
        ratio = sqrt(rows * columns / (rule.most_tiles * _side(rule) ** 2))
        if ratio > _SLACK:
            rows, columns = int(rows // ratio), int(columns // ratio)
    return rows * columns + rows
