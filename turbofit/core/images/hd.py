"""Phi-3-vision and Phi-3.5-vision: an image is a page (a grid) of tiles, padded to a fixed number.

The page has about the image's shape, and is as wide as at most ``num_crops`` tiles allow; a
portrait is first turned to landscape. Only the tiles of the page and the tile of the whole image
give tokens. One token ends each row of tokens, and one token separates the page from the whole
image.

The numbers of tokens are LMDeploy's. The preprocessor is code of the checkpoint; no test runs it.
"""

from __future__ import annotations

from math import ceil, isqrt

from turbofit.core.images.base_tile import BaseTileRule
from turbofit.core.images.rule import FolderEdits, Size


class HdRule(BaseTileRule, tag="hd"):
    """Phi-3-vision: every image is padded to ``max_dynamic_patch`` tiles.

    One more tile shows the whole image.
    """

    varies_by_size = False
    client_knobs: bool = False

    def _worst_units(self, limit: int) -> int:
        return limit + 1

    def tokens(self, width: int, height: int, limit: int | None = None) -> int:
        most = self.units(width, height, limit) - 1
        long, short = max(width, height), min(width, height)
        ratio, scale = long / short, 1
        while scale * ceil(scale / ratio) <= most:
            scale += 1
        scale -= 1
        lines = max(1, ceil(int(scale * self.tile_size / ratio) / self.tile_size))
        return self._page(*((scale, lines) if height > width else (lines, scale)))

    def unit_tokens(self, units: int) -> int:
        """Return the tokens of a single column of tiles, the most of any image of ``units``."""
        return self._page(max(1, units - 1), 1)

    def units_within(self, tokens: int, *, padded: int | None = None) -> int:
        """Return an upper bound of the units of images that have at most ``tokens`` in all.

        Each image has at least the tokens of a page of one tile, so the tokens limit the number of
        images. Each image is padded to ``padded`` units, by default the checkpoint's own number.
        """
        return tokens // self._page(1, 1) * (padded or self.max_dynamic_patch + 1)

    def folder_edits(self, limit: int) -> FolderEdits:
        return FolderEdits({}, {"num_crops": limit})

    def worst_size(self, limit: int | None = None) -> Size:
        """Return the size of a single column of tiles, the image with the most tokens."""
        return self.tile_size, self.tile_size * (self.max_dynamic_patch if limit is None else limit)

    def _page(self, rows: int, columns: int) -> int:
        side = isqrt(self.tokens_per_tile)
        return (rows * columns + 1) * self.tokens_per_tile + 1 + (rows + 1) * side
