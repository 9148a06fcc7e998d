"""LLaVA-NeXT and OneVision: an image is fitted into the best of a list of grids of tiles.

The whole image, made smaller, is one more tile. The grid with the least loss of resolution wins; of
equally good grids, the grid with the least padding wins. Tokens in the padding are removed, so
that an image gives fewer tokens than all its tiles have.
"""

from __future__ import annotations

from math import sqrt
from typing import Final

from turbofit.core.images.base_tile import BaseTileRule
from turbofit.core.images.rule import FolderEdits, Size

#: Height and width in pixels.
Grid = tuple[int, int]

#: Tokens are resampled if their number is more than 1.1**2 times that of ``most_tiles`` tiles.
_SLACK: Final = 1.1


class AnyresRule(BaseTileRule, tag="anyres"):
    """LLaVA-NeXT and OneVision: the best of a list of grids, and a tile of the whole image.

    ``grids`` are in the checkpoint's order; of equally good grids the first wins.
    ``max_dynamic_patch`` is the number of tiles of the largest grid. Each row of tokens ends with
    one more token. If an image has more tokens than ``most_tiles`` tiles, its tokens are
    resampled to about the tokens of ``most_tiles`` tiles.
    """

    grids: tuple[Grid, ...]
    most_tiles: int | None = None
    client_knobs: bool = False
    varies_by_size = True

    def grids_within(self, limit: int) -> tuple[Grid, ...]:
        """Return the grids of at most ``limit`` tiles; a grid of one tile if all grids are larger.

        A model folder with a lowered limit has only these grids as ``image_grid_pinpoints``.
        """
        kept = tuple(grid for grid in self.grids if self._tiles(grid) <= limit)
        return kept or ((self.tile_size, self.tile_size),)

    def _units(self, width: int, height: int, limit: int) -> int:
        return self._tiles(_best(self.grids_within(limit), width, height)) + 1

    def _worst_units(self, limit: int) -> int:
        """Return the most units of one image: the largest grid's tiles, and the whole image's."""
        return max(self._tiles(grid) for grid in self.grids_within(limit)) + 1

    def tokens(self, width: int, height: int, limit: int | None = None) -> int:
        """Return the tokens of an image.

        Padding has no tokens; each row of tokens ends with one more token.
        """
        self.units(width, height, limit)  # raises an error for a size that is not valid
        within = self.grids_within(self.max_dynamic_patch if limit is None else limit)
        grid, side = _best(within, width, height), self._side
        rows, columns = side * (grid[0] // self.tile_size), side * (grid[1] // self.tile_size)
        # Padding is cut off on both sides alike; the preprocessor rounds to 7 digits.
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        return self.tokens_per_tile + self._packed(rows, columns)

    def unit_tokens(self, units: int) -> int:
        """Return the tokens of an image that has at most ``units`` and fills its whole grid.

        The number is exact for an image in the shape of its grid. For resampled tokens the number
        is an upper bound: 1.21 times the tokens of ``most_tiles`` tiles, one token for each row,
        and the tile of the whole image.
        """
        side, most = self._side, 0
        for height, width in (*self.grids, (self.tile_size, self.tile_size)):
            rows, columns = side * (height // self.tile_size), side * (width // self.tile_size)
            if self._tiles((height, width)) > units - 1:
                continue
            full = self._packed(rows, columns)
            if self.most_tiles and rows * columns > _SLACK**2 * self.most_tiles * side**2:
                # An image with padding may have just too few tokens to be resampled, and so more
                # tokens than a full grid.
                full = max(full, int(_SLACK**2 * self.most_tiles * side**2) + rows)
            most = max(most, full)
        return self.tokens_per_tile + most

    def units_within(self, tokens: int, *, padded: int | None = None) -> int:
        """Return an upper bound of the units of images that have at most ``tokens`` in all.

        Each image has at least the tokens of one tile, that of the whole image. So the tokens limit
        the number of images; each image counts with the most units.
        """
        return tokens // self.tokens_per_tile * self.worst_units()

    def lower_limits(self, steps: int = 16) -> tuple[int, ...]:
        """Return the numbers of tiles of the grids, the largest first.

        A limit between two of these numbers has the effect of the lower number.
        """
        return tuple(sorted({1} | {self._tiles(grid) for grid in self.grids}, reverse=True))

    def folder_edits(self, limit: int) -> FolderEdits:
        """Return the grids within the limit for both config.json and the image processor's file."""
        grids = {"image_grid_pinpoints": [list(grid) for grid in self.grids_within(limit)]}
        return FolderEdits(grids, grids)

    def worst_size(self, limit: int | None = None) -> Size:
        """Return the size with the most tokens among the sizes with the most tiles."""
        limit = self.max_dynamic_patch if limit is None else limit

        def rank(size: Grid) -> tuple[int, int]:
            return self.units(*size, limit), self.tokens(*size, limit)

        return max(((wide, high) for high, wide in self.grids_within(limit)), key=rank)

    @property
    def _side(self) -> int:
        """Tokens along a side of a tile."""
        return round(sqrt(self.tokens_per_tile))

    def _tiles(self, grid: Grid) -> int:
        return (grid[0] // self.tile_size) * (grid[1] // self.tile_size)

    def _packed(self, rows: int, columns: int) -> int:
        """Return the tokens of ``rows`` rows, each of ``columns`` tokens and one more token.

        A grid with clearly more tokens than ``most_tiles`` tiles is resampled to fewer tokens.
        """
        if self.most_tiles:
            ratio = sqrt(rows * columns / (self.most_tiles * self._side**2))
            if ratio > _SLACK:
                rows, columns = int(rows // ratio), int(columns // ratio)
        return rows * columns + rows


def _best(grids: tuple[Grid, ...], width: int, height: int) -> Grid:
    """Return the grid that the preprocessor chooses for an image; sizes are rounded as there."""
    best, kept, wasted = grids[0], 0, float("inf")
    for grid in grids:
        scale = min(grid[1] / width, grid[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = grid[0] * grid[1] - effective
        if effective > kept or (effective == kept and waste < wasted):
            best, kept, wasted = grid, effective, waste
    return best
