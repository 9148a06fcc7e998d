"""InternVL: an image becomes a grid of square tiles of the nearest aspect, and a thumbnail.

The grid is chosen as in Transformers and LMDeploy, with their floating point: the grid whose
width/height is nearest to the image's wins. Of equally near grids, a larger grid wins if the image
covers more than half of the larger grid. The order of grids with the same number of tiles does not
matter.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

from turbofit.core.errors import UsageError
from turbofit.core.images.base_tile import DETAIL_PATCHES, LARGEST_PATCH_LIMIT, BaseTileRule
from turbofit.core.images.rule import DummyImage, FolderEdits, Size
from turbofit.core.units import grouped


class TileRule(BaseTileRule, tag="tile"):
    """The rule of InternVL.

    LLaVA-1.5, CogVLM and GLM-4V also have this rule, with one tile for each image.
    """

    @staticmethod
    def square(size: int, tokens: int) -> TileRule:
        """Make a rule with one tile of ``size`` x ``size`` pixels for every image."""
        return TileRule(
            tile_size=size, tokens_per_tile=tokens, max_dynamic_patch=1, thumbnail=False,
            dynamic=False, client_knobs=False,
        )  # fmt: skip

    def _units(self, width: int, height: int, limit: int) -> int:
        """Return the units of an image; one tile if the limit is below the rule's minimum."""
        if not self.dynamic:
            return 1
        best = _tiles(width, height, self.min_dynamic_patch, _checked(limit), self.tile_size)
        return best + 1 if self.thumbnail and best > 1 else best

    def _worst_units(self, limit: int) -> int:
        """Return the units of a strip of 1 x ``limit`` tiles, the most units of any image."""
        if not self.dynamic or _checked(limit) < max(self.min_dynamic_patch, 2):
            return 1
        return limit + 1 if self.thumbnail else limit

    @property
    def exposed_limit(self) -> int:
        """The highest limit that clients can set without a gateway, in tiles.

        The limit is that of ``detail: high``, or the checkpoint's own limit if this limit is higher
        or LMDeploy does not read the field.
        """
        if not self.dynamic or not self.client_knobs:
            return self.max_dynamic_patch
        return max(self.max_dynamic_patch, *DETAIL_PATCHES.values())

    @property
    def processor_limit(self) -> str | None:
        return "max_patches" if self.dynamic and not self.client_knobs else None

    @property
    def by_table(self) -> bool:
        return self.dynamic and self.client_knobs

    def folder_edits(self, limit: int) -> FolderEdits:
        """Return the edits of a model folder that make ``limit`` its default image limit.

        The edits are for config.json, or in the Transformers format for the image processor's file.
        """
        if self.client_knobs:
            return FolderEdits({"max_dynamic_patch": limit}, {})
        smallest = min(self.min_dynamic_patch, limit)
        return FolderEdits({}, {"max_patches": limit, "min_patches": smallest})

    def image_of(self, units: int) -> DummyImage:
        """Return an image of ``units`` whose grid is as square as possible."""
        tiles = max(1, self._tiles_of(units))
        rows = next(n for n in range(isqrt(tiles), 0, -1) if tiles % n == 0)
        size = self.tile_size * (tiles // rows), self.tile_size * rows
        return DummyImage(size, self.knobs(tiles) if self.client_knobs else {})

    def stretched(self, size: Size, limit: int) -> Size | None:
        """Return the size of the grid to which the preprocessor stretches an image."""
        width, height = size
        count = self._tiles_of(self._units(width, height, limit))
        columns = min(
            (columns for columns in range(1, count + 1) if count % columns == 0),
            key=lambda columns: abs(width / height - columns / (count // columns)),
        )
        return self.tile_size * columns, self.tile_size * (count // columns)

    def _tiles_of(self, units: int) -> int:
        """Return the tiles of an image of ``units``, without the thumbnail."""
        return units - 1 if self.thumbnail and units > 1 else units


@lru_cache(maxsize=4096)
def _tiles(width: int, height: int, smallest: int, limit: int, tile_size: int) -> int:
    """Return the number of tiles of the grid that is chosen for an image."""
    aspect, area = width / height, width * height
    best, nearest = 1, float("inf")
    for count, ratios in _grids(smallest, limit):
        distance = min(abs(aspect - ratio) for ratio in ratios)
        if distance < nearest:
            best, nearest = count, distance
        elif distance == nearest and area > 0.5 * tile_size * tile_size * count:
            best = count
    return best


@lru_cache(maxsize=32)
def _grids(smallest: int, limit: int) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """Return each number of tiles, fewest first, with the aspect ratios of grids of that number.

    A ratio is width / height.
    """
    grids = ((w, h) for w in range(1, limit + 1) for h in range(1, limit // w + 1))
    by_count = grouped((w * h, w / h) for w, h in grids if w * h >= smallest)
    return tuple((count, tuple(by_count[count])) for count in sorted(by_count))


def _checked(limit: int) -> int:
    if limit > LARGEST_PATCH_LIMIT:
        raise UsageError(
            f"max_dynamic_patch {limit} is beyond {LARGEST_PATCH_LIMIT}",
            hint="12 is the published limit of InternVL; 24 is what detail=high asks for",
        )
    return limit
