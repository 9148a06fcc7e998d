"""What all rules share whose units are square tiles of one size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from turbofit.core.images.client import number
from turbofit.core.images.rule import DummyImage, FolderEdits, ImageRule, Lowered, Size

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DETAIL_PATCHES", "BaseTileRule"]

#: ``image_url.detail`` of an OpenAI client, as LMDeploy's InternVLChatModel reads it; any other
#: value means the checkpoint's own limit. An integer ``max_dynamic_patch`` wins over it.
DETAIL_PATCHES: Final = {"low": 6, "medium": 12, "high": 24}


class BaseTileRule(ImageRule):
    """An image becomes square tiles; the limit is how many, a tile of the whole image aside.

    ``max_dynamic_patch`` is the checkpoint's own limit. ``thumbnail``: the whole image is one tile
    more where there is more than one. ``dynamic`` false means one tile for every image.

    Subclasses provide: ``_units`` and ``_worst_units``; and what differs from a grid of tiles, each
    of which gives ``tokens_per_tile`` tokens.
    """

    unit_name = "tile"
    units_name = "tiles"
    limit_unit = "tiles"
    limit_name = "max_dynamic_patch"
    plan_limit_name = "max_dynamic_patch"
    few_limits = True
    slim = 1 << 30

    tile_size: int
    tokens_per_tile: int
    max_dynamic_patch: int
    min_dynamic_patch: int = 1
    thumbnail: bool = True
    dynamic: bool = True
    client_knobs: bool = True

    @property
    def checkpoint_limit(self) -> int:
        """See :class:`ImageRule`."""
        return self.max_dynamic_patch

    @property
    def least_limit(self) -> int:
        """See :class:`ImageRule`."""
        return self.min_dynamic_patch

    @property
    def limit_step(self) -> int:
        """See :class:`ImageRule`."""
        return 1

    @property
    def unit_step(self) -> int:
        """See :class:`ImageRule`."""
        return 1

    @property
    def edge(self) -> int:
        """See :class:`ImageRule`."""
        return self.tile_size

    @property
    def varies_by_size(self) -> bool:
        """See :class:`ImageRule`."""
        return self.dynamic

    @property
    def varies_by_limit(self) -> bool:
        """See :class:`ImageRule`."""
        return self.dynamic

    @property
    def summary(self) -> str:
        """See :class:`ImageRule`."""
        if self.dynamic:
            return f"{self.max_dynamic_patch} tiles"
        return f"{self.tile_size} px square"

    @property
    def least_units(self) -> int:
        """See :class:`ImageRule`."""
        return self._worst_units(self.lower_limits()[-1])

    def unit_tokens(self, units: int) -> int:
        """See :class:`ImageRule`."""
        return self.features(units)

    def units_within(self, tokens: int, *, padded: int | None = None) -> int:  # noqa: ARG002
        """See :class:`ImageRule`."""
        return tokens // max(1, self.tokens_per_tile)

    def features(self, units: int) -> int:
        """See :class:`ImageRule`."""
        return units * self.tokens_per_tile

    def tower_tokens(self, patch_size: int) -> int:
        """See :class:`ImageRule`: a tile's patches, and the class token."""
        return (self.tile_size // patch_size) ** 2 + 1

    def unit_values(self, channels: int, temporal_patch: int) -> int:  # noqa: ARG002
        """See :class:`ImageRule`."""
        return channels * self.tile_size**2

    def largest_limit(self, units: int) -> int | None:
        """See :class:`ImageRule`."""
        return next((one for one in self.lower_limits() if self._worst_units(one) <= units), None)

    def lower_limits(self, steps: int = 16) -> tuple[int, ...]:  # noqa: ARG002
        """See :class:`ImageRule`."""
        return tuple(range(self.max_dynamic_patch, 0, -1)) if self.dynamic else (1,)

    def limits_below(self, most: int) -> range:
        """See :class:`ImageRule`."""
        return range(1, most)

    def limits_for(self, tokens: Iterable[int]) -> Iterable[int]:  # noqa: ARG002
        """See :class:`ImageRule`."""
        return range(1, self.max_dynamic_patch + 1) if self.dynamic else ()

    def with_limit(self, limit: int) -> Self:
        """See :class:`ImageRule`."""
        return replace(self, max_dynamic_patch=limit)

    def knobs(self, limit: int) -> dict[str, int]:
        """See :class:`ImageRule`."""
        return {"max_dynamic_patch": limit}

    def folder_edits(self, limit: int) -> FolderEdits:  # noqa: ARG002
        """See :class:`ImageRule`; nothing where no file has a limit."""
        return FolderEdits({}, {})

    def lower(
        self, size: Size, asked: Mapping[str, Any], *, planned: int, default: int, most: int,
        cap: int | None,
    ) -> Lowered:  # fmt: skip
        """See :class:`ImageRule`: an integer ``max_dynamic_patch`` wins, then ``detail``."""
        patch, word = asked.get("max_dynamic_patch"), asked.get("detail")
        detail = word if isinstance(word, str) else ""
        wanted = DETAIL_PATCHES.get(detail, default)
        if isinstance(patch, int):
            wanted = int(patch)
        limit = max(1, min(wanted, planned))
        count = self.units(*size, limit)
        if count > most:
            limit = min(limit, self.largest_limit(most) or 1)
            count = self.units(*size, limit)
        if cap is not None and cap < limit:
            capped = self.units(*size, cap)
            limit, count = (cap, capped) if capped < count else (limit, count)
        changes: tuple[tuple[str, object, int], ...] = ()
        if number(patch) > limit:
            changes = (("max_dynamic_patch", patch, limit),)
        elif wanted > limit and detail in DETAIL_PATCHES:
            changes = (("detail", detail, limit),)
        elif wanted > limit:
            changes = (("max_dynamic_patch", wanted, limit),)
        return Lowered(self.knobs(limit), count, changes)

    @property
    def small_image(self) -> DummyImage:
        """See :class:`ImageRule`."""
        return DummyImage((self.tile_size,) * 2, self.knobs(1) if self.client_knobs else {})

    def image_of(self, units: int) -> DummyImage | None:  # noqa: ARG002
        """See :class:`ImageRule`."""
        return None

    def grid(self, units: int) -> int | list[int]:
        """See :class:`ImageRule`."""
        return units

    def cells(self, limit: int) -> int:
        """See :class:`ImageRule`."""
        return limit if self.dynamic else 1
