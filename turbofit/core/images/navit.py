"""Kimi-K2.5: an image is shrunk to a budget of whole patches, then padded to whole windows.

No image is enlarged or stretched. With its padding, an image may exceed the budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import sqrt
from typing import Annotated, ClassVar, Final

from msgspec import Meta
from msgspec.structs import replace
from typing_extensions import Self

from turbofit.core.images.patch import PatchRule
from turbofit.core.images.rule import FolderEdits, Size

#: The most patches along a side that a checkpoint may allow, and that the search for the worst
#: image tries.
LARGEST_SIDE: Final = 1 << 12


class NavitRule(PatchRule, tag="navit"):
    """Kimi-K2.5: an image has a budget of patches, and at most ``side`` patches along a side.

    ``max_pixels`` is the budget, counted in pixels. A strip as narrow as one window may have
    ``side`` patches in its length, even beyond the budget.
    """

    mrope: ClassVar[bool] = False
    #: LMDeploy's front end refuses ``mm_processor_kwargs`` for this model.
    by_request = False

    min_pixels: int = 1
    client_knobs: bool = False
    side: Annotated[int, Meta(le=LARGEST_SIDE)] = 512

    def patches(self, width: int, height: int, limit: int | None = None) -> tuple[int, int]:
        """Return the rows and columns of an image's patches, padding included."""
        limit = self.max_pixels if limit is None else limit
        wide, high = self._shrunk((width, height), limit)
        return -(-high // self.edge) * self.merge, -(-wide // self.edge) * self.merge

    def _units(self, width: int, height: int, limit: int) -> int:
        rows, columns = self.patches(width, height, limit)
        return rows * columns

    def _shrunk(self, size: Size, limit: int) -> Size:
        """Return the size in pixels before padding, with the rounding of the preprocessor."""
        width, height = size
        patch, longest = self.patch_size, self.side * self.patch_size
        patches = max(1, width // patch) * max(1, height // patch)
        budget = max(1, limit // patch**2)
        scale = min(1.0, sqrt(budget / patches), longest / width, longest / height)
        return (
            min(longest, max(1, int(width * scale))),
            min(longest, max(1, int(height * scale))),
        )

    def _worst_units(self, limit: int) -> int:
        width, height = _worst_size(self, limit)
        return self._units(width, height, limit)

    def worst_size(self, limit: int | None = None) -> Size:
        """Return the size of an image with the most units; the engine must have the same limit."""
        return _worst_size(self, self.max_pixels if limit is None else limit)

    def candidates(self, limit: int) -> Iterator[Size]:
        """Yield image sizes; at least one of them has the most units under the limit.

        The sizes are a strip and, for each number of windows across, the tallest images. The budget
        counts whole patches, so both sides may be almost one patch longer. A width that ends at the
        first pixel of its last window has the fewest patches across, and so allows the most rows.
        """
        patch, last = self.patch_size, self.side - 1
        budget = max(1, limit // patch**2)
        yield 1, patch * max(self.side, self.side**2 // budget)
        for window in range(1, self.side // self.merge):
            across = window * self.merge
            width = (across + 1) * patch - 1
            # The least scale that keeps the first pixel of the last window.
            least = (window * self.edge + 1) / width
            most = max(1, int(budget / (across * least**2)))
            # The rows of an image that the budget shrinks to about the longest side.
            full = max(last, last**2 * across // budget)
            for down in {most, min(most, full), min(most, full + 1)}:
                yield width, (down + 1) * patch - 1

    def with_limit(self, limit: int) -> Self:
        return replace(self, max_pixels=limit)

    def knobs(self, limit: int) -> dict[str, int]:
        return {"max_pixels": limit}

    def folder_edits(self, limit: int) -> FolderEdits:
        return FolderEdits({}, {"in_patch_limit": limit // self.patch_size**2}, "media_proc_cfg")

    def stretched(self, size: Size, limit: int) -> Size | None:
        return self._shrunk(size, limit)


@lru_cache(maxsize=256)
def _worst_size(rule: NavitRule, limit: int) -> Size:
    """Return the size of an image with the most patches; the widest of several sizes."""
    return max(
        rule.candidates(limit), key=lambda size: (rule.units(size[0], size[1], limit), size[0])
    )
