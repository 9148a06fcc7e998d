"""Idefics3 and SmolVLM: every image is resized until its longer side is a whole number of tiles.

The number of tiles thus depends on the shape of an image, not on its size.
"""

from __future__ import annotations

from math import ceil, isqrt

from turbofit.core.images.base_tile import BaseTileRule
from turbofit.core.images.rule import DummyImage, FolderEdits, Size

#: The preprocessor makes no side longer than this many pixels.
LARGEST_EDGE = 4096


class LongestEdgeRule(BaseTileRule, tag="longest_edge"):
    """Idefics3: the longer side of every image becomes a fixed number of tiles.

    The shorter side becomes as many tiles as cover this side. ``max_dynamic_patch`` is the square
    of the fixed number; a limit between two squares acts like the lower square. In the prompt, each
    tile has two more tokens: ``<fake_token_around_image>`` and the tile's position. Each row of
    tiles ends with a line feed. The tile of the whole image has a line feed and one more token.
    """

    common_limits = (16, 9, 4, 1)

    client_knobs: bool = False

    @property
    def least_units(self) -> int:
        """The units of a narrow strip, the fewest units of any image.

        Small images are enlarged, so no image has fewer units.
        """
        return self._units(self.tile_size, 1, self.max_dynamic_patch)

    @property
    def small_image(self) -> DummyImage:
        """A narrow strip, the image with the fewest tiles."""
        return DummyImage((self.tile_size, self.tile_size // 8), {})

    def _units(self, width: int, height: int, limit: int) -> int:
        rows, columns = self._grid(width, height, limit)
        return rows * columns + 1 if rows * columns > 1 else 1

    def _worst_units(self, limit: int) -> int:
        """Return the units of a square image, the most units of any image.

        If a side has an odd number of pixels, rounding up to an even number adds a row of tiles.
        """
        return self._units(1, 1, limit)

    def tokens(self, width: int, height: int, limit: int | None = None) -> int:
        """Return the tokens of an image.

        The number is one too high if the tokenizer joins two line feeds into one token.
        """
        units = self.units(width, height, limit)
        rows, _ = self._grid(width, height, self.max_dynamic_patch if limit is None else limit)
        return self._prompt_tokens(units, rows)

    def unit_tokens(self, units: int) -> int:
        """Return an upper bound of the tokens of an image of ``units``.

        Each row of tiles ends with a line feed; the number counts the most possible rows.
        """
        most, _ = self._grid(1, 1, self.max_dynamic_patch)
        return self._prompt_tokens(units, min(most, max(1, units - 1)))

    def units_within(self, tokens: int, *, padded: int | None = None) -> int:
        return tokens // (self.tokens_per_tile + 2)

    def lower_limits(self, steps: int = 16) -> tuple[int, ...]:
        return tuple(side**2 for side in range(isqrt(self.max_dynamic_patch), 0, -1))

    def folder_edits(self, limit: int) -> FolderEdits:
        return FolderEdits({}, {"size": {"longest_edge": isqrt(max(1, limit)) * self.tile_size}})

    def worst_size(self, limit: int | None = None) -> Size:
        """Return the size of a square image, the image with the most units under the limit.

        An engine that does not know the limit makes more units of every image.
        """
        side = isqrt(max(1, self.max_dynamic_patch if limit is None else limit))
        return (side * self.tile_size,) * 2

    def _prompt_tokens(self, units: int, rows: int) -> int:
        return units * (self.tokens_per_tile + 2) + (rows + 2 if units > 1 else 1)

    def _grid(self, width: int, height: int, limit: int) -> tuple[int, int]:
        """Return the rows and columns of tiles, with the rounding of the preprocessor."""
        edge, tile = isqrt(max(1, limit)) * self.tile_size, self.tile_size
        aspect = width / height
        if width >= height:
            wide, high = edge, _even(int(edge / aspect))
            high = int(ceil(wide / tile) * tile / (wide / high))
            return max(1, ceil(high / tile)), ceil(wide / tile)
        wide, high = _even(int(edge * aspect)), edge
        wide = int(ceil(high / tile) * tile * (wide / high))
        return ceil(high / tile), max(1, ceil(wide / tile))


def _even(side: int) -> int:
    return max(1, side + side % 2)
