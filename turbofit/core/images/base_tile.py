"""The base of all image rules with square tiles of one size as units."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

from turbofit.core.images.rule import Allowed, DummyImage, FolderEdits, ImageRule, Lowered, Size
from turbofit.core.messages import counted
from turbofit.core.struct import Options
from turbofit.core.units import number

#: With a larger limit, LMDeploy's search for a grid takes minutes for one image. The time of the
#: search grows with the cube of the limit.
LARGEST_PATCH_LIMIT: Final = 4096

#: Limits that LMDeploy's InternVLChatModel reads from ``image_url.detail`` of an OpenAI client;
#: other values mean the checkpoint's own limit. An integer ``max_dynamic_patch`` wins over
#: ``detail``.
DETAIL_PATCHES: Final = {"low": 6, "medium": 12, "high": 24}


class BaseTileRule(ImageRule):
    """Base of the rules with square tiles.

    ``max_dynamic_patch`` is the checkpoint's own limit; limits do not count the tile of the whole
    image. ``thumbnail``: an image of several tiles has one more tile of the whole image. If
    ``dynamic`` is False, every image is one tile.
    """

    unit_name = "tile"
    limit_unit = "tiles"
    common_limits = (12, 6, 4, 1)
    limit_name = "max_dynamic_patch"
    plan_limit_name = "max_dynamic_patch"
    few_limits = True
    slim = 1 << 30

    tile_size: int
    tokens_per_tile: int
    max_dynamic_patch: Annotated[int, Meta(ge=1, le=LARGEST_PATCH_LIMIT)]
    min_dynamic_patch: int = 1
    thumbnail: bool = True
    dynamic: bool = True
    client_knobs: bool = True

    @property
    def least_limit(self) -> int:
        return self.min_dynamic_patch

    @property
    def varies_by_size(self) -> bool:
        return self.dynamic

    @property
    def varies_by_limit(self) -> bool:
        return self.dynamic

    @property
    def summary(self) -> str:
        if self.dynamic:
            return counted(self.max_dynamic_patch, self.unit_name)
        return f"{self.tile_size} px square"

    @property
    def unit_side(self) -> int:
        return self.tile_size

    @property
    def least_units(self) -> int:
        return self._worst_units(self.lower_limits()[-1])

    def units_within(self, tokens: int, *, padded: int | None = None) -> int:
        return tokens // max(1, self.tokens_per_tile)

    def features(self, units: int) -> int:
        return units * self.tokens_per_tile

    def tower_tokens(self, patch_size: int) -> int:
        """Return the tower's tokens for one tile: its patches and one class token."""
        return (self.tile_size // patch_size) ** 2 + 1

    def _units(self, width: int, height: int, limit: int) -> int:
        """Return the most units: a rule whose images vary by size overrides this method."""
        return self._worst_units(limit)

    def unit_values(self, channels: int, temporal_patch: int) -> int:
        return channels * self.tile_size**2

    def largest_limit(self, units: int) -> int | None:
        within = (limit for limit in self.lower_limits() if self._worst_units(limit) <= units)
        return next(within, None)

    def lower_limits(self, steps: int = 16) -> tuple[int, ...]:
        return tuple(range(self.max_dynamic_patch, 0, -1)) if self.dynamic else (1,)

    def limits_below(self, most: int) -> range:
        return range(1, most)

    def folder_edits(self, limit: int) -> FolderEdits:
        """Return no edits; a rule whose model folders have a limit overrides this method."""
        return FolderEdits({}, {})

    def lower(self, size: Size, options: Options, to: Allowed) -> Lowered:
        """Return LMDeploy's fields that lower a client's image to the allowed limits.

        A client's ``max_dynamic_patch`` wins over its ``detail``.
        """
        asked, word = options.get("max_dynamic_patch"), options.get("detail")
        detail = word if isinstance(word, str) else ""
        wanted = int(asked) if isinstance(asked, int) else DETAIL_PATCHES.get(detail, to.default)
        limit = max(1, min(wanted, to.planned))
        units = self.units(*size, limit)
        if units > to.units:
            limit = min(limit, self.largest_limit(to.units) or 1)
            units = self.units(*size, limit)
        if to.cap is not None and to.cap < limit:
            capped = self.units(*size, to.cap)
            limit, units = (to.cap, capped) if capped < units else (limit, units)
        # The client is told what was lowered: the field that it sent, or the default limit.
        change: tuple[str, object] = ("max_dynamic_patch", wanted)
        if number(asked) > limit:
            change = ("max_dynamic_patch", asked)
        elif detail in DETAIL_PATCHES:
            change = ("detail", detail)
        elif wanted == to.default and self.units(*size, wanted) <= units:
            wanted = limit  # the default gives this image no more units: nothing was lowered
        lowered = number(asked) > limit or wanted > limit
        return Lowered(self.knobs(limit), units, ((*change, limit),) if lowered else ())

    @property
    def small_image(self) -> DummyImage:
        return DummyImage((self.tile_size,) * 2, self.knobs(1) if self.client_knobs else {})

    def grid(self, units: int) -> int | list[int]:
        return units

    def _cells(self, limit: int) -> tuple[int, int]:
        return limit if self.dynamic else 1, self.tile_size
