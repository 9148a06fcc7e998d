"""Llama 4: an image is laid on a canvas, which is any grid of at most ``max_patches`` tiles.

Some canvases may hold the image without shrinking; the canvas that enlarges the image least is then
taken. Otherwise the canvas that shrinks the image least is taken. Of equally good canvases the
smallest is taken. An image of more than one tile has one more tile of the whole image.
"""

from __future__ import annotations

from functools import lru_cache
from struct import pack, unpack

from turbofit.core.images.rule import FolderEdits, Size
from turbofit.core.images.tile import TileRule


class CanvasRule(TileRule, tag="canvas"):
    """Llama 4: a canvas has at most ``max_dynamic_patch`` tiles.

    ``tokens_per_tile`` counts the tile's own tokens and one token after them: a separator, or the
    mark of the tile of the whole image.
    """

    client_knobs: bool = False

    def _units(self, width: int, height: int, limit: int) -> int:
        """Return the tiles of the best canvas, with floating point as in the preprocessor."""
        best, tiles = 0.0, 0
        for rows, columns in _canvases(max(1, limit)):
            scale = min(
                _quotient(columns * self.tile_size, width), _quotient(rows * self.tile_size, height)
            )
            if not tiles or _rank(scale) > _rank(best):
                best, tiles = scale, rows * columns
            elif scale == best:
                tiles = min(tiles, rows * columns)
        return tiles + 1 if tiles > 1 else 1

    def folder_edits(self, limit: int) -> FolderEdits:
        return FolderEdits({}, {"max_patches": limit})

    def stretched(self, size: Size, limit: int) -> Size | None:
        """Return None: the image keeps its shape on the canvas."""
        return None


def _rank(scale: float) -> tuple[bool, float]:
    """Return a sort key of a scale; a larger key is a better scale.

    Enlarging is better than shrinking. Of several enlarging or several shrinking scales, the scale
    nearest to 1 is best.
    """
    return scale >= 1, -scale if scale >= 1 else scale


@lru_cache(maxsize=32)
def _canvases(limit: int) -> tuple[tuple[int, int], ...]:
    """Return the rows and columns of each canvas of at most ``limit`` tiles."""
    return tuple(
        (rows, columns) for rows in range(1, limit + 1) for columns in range(1, limit // rows + 1)
    )


def _quotient(first: int, second: int) -> float:
    """Return the quotient of two integers, rounded to a float of 32 bits as in torch."""
    value: float = unpack("f", pack("f", first / second))[0]
    return value
