"""Qwen2-VL and its successors, and GLM-4.1V: an image is resized to whole windows of patches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import floor, isqrt, sqrt

from msgspec.structs import replace
from typing_extensions import Self

from turbofit.core.errors import UsageError
from turbofit.core.images.rule import Allowed, DummyImage, FolderEdits, ImageRule, Lowered, Size
from turbofit.core.images.video import LARGEST_RATIO, VideoRule, Videos, windows
from turbofit.core.struct import Options
from turbofit.core.units import bisect, number


class PatchRule(ImageRule, tag="patch"):
    """Qwen2-VL: an image is resized to a multiple of ``patch_size * merge`` within pixel bounds.

    A unit is one vision patch; ``merge`` x ``merge`` patches become one token. The preprocessor
    treats an image as ``frames`` equal frames. The bounds in the checkpoint's file are for all
    these frames; ``min_pixels`` and ``max_pixels`` here are for one frame. ``enlarge``: an image
    with a side below a window is first enlarged. ``video`` is None if LMDeploy takes no videos for
    this model.
    """

    unit_name = "patch"
    whole_image = True
    limit_unit = "pixels"
    common_limits = (4_000_000, 2_000_000, 1_000_000, 500_000)
    limit_name = "max_pixels"
    plan_limit_name = "max_pixels_per_image"
    few_limits = False
    mrope = True
    slim = 16

    patch_size: int
    merge: int
    min_pixels: int
    max_pixels: int
    client_knobs: bool = True
    frames: int = 1
    enlarge: bool = False
    video: VideoRule | None = None

    @property
    def least_limit(self) -> int:
        return max(self.limit_step, self.min_pixels)

    @property
    def limit_step(self) -> int:
        """The pixels of one window."""
        return self.edge**2

    @property
    def unit_step(self) -> int:
        """The patches of one window."""
        return self.merge**2

    @property
    def edge(self) -> int:
        return self.patch_size * self.merge

    @property
    def by_request(self) -> bool:
        return not self.client_knobs

    @property
    def summary(self) -> str:
        return f"{self.max_pixels / 1e6:.1f} MP"

    @property
    def unit_side(self) -> int:
        return self.patch_size

    @property
    def videos(self) -> Videos | None:
        return Videos(self.video, self.patch_size, self.merge) if self.video else None

    def _units(self, width: int, height: int, limit: int) -> int:
        rows, columns = self._windows((width, height), limit, self.min_pixels)
        return rows * columns * self.merge**2

    def _windows(self, size: Size, largest: int, smallest: int) -> tuple[int, int]:
        if largest < 1 or smallest < 1:
            raise UsageError(
                f"pixel bounds {smallest}..{largest} leave no image", hint="give them in pixels"
            )
        return windows(*size, self.edge, largest, smallest, enlarge=self.enlarge, what="image")

    def _worst_units(self, limit: int) -> int:
        """Return an upper bound of the patches of one image.

        The bound is exact if the largest number of windows forms a grid of at most 200 : 1, such as
        128 x 128 in the published models; else the bound is a fraction of a percent too high.

        Two kinds of images may exceed the limit, and the bound covers both. A long strip keeps one
        window of height, under a limit below about 157,000 pixels. An image that is enlarged to a
        ``min_pixels`` near the limit has its sides rounded up.
        """
        area, smallest = self.limit_step, self.min_pixels
        most = max(1, limit // area)
        if limit < LARGEST_RATIO * area:
            most = max(most, isqrt(LARGEST_RATIO * limit) // self.edge)
        strip = sqrt(smallest / LARGEST_RATIO) + sqrt(LARGEST_RATIO * smallest)
        most = max(most, floor(smallest / area + strip / self.edge + 1 + 1e-6))
        return most * self.merge**2

    def units_within(self, tokens: int, *, padded: int | None = None) -> int:
        return tokens * self.merge**2

    def features(self, units: int) -> int:
        return units // self.merge**2

    def tower_tokens(self, patch_size: int) -> int:
        return 1

    def unit_values(self, channels: int, temporal_patch: int) -> int:
        return channels * temporal_patch * self.patch_size**2

    def largest_limit(self, units: int) -> int | None:
        """Return the largest limit, in pixels of whole windows, that allows at most ``units``.

        None if a single window already has more than ``units``.
        """
        area = self.limit_step
        most = min(units // self.merge**2, self.max_pixels // area)
        return area * bisect(lambda n: self._worst_units(n * area) <= units, 0, most + 1)[0] or None

    def lower_limits(self, steps: int = 16) -> tuple[int, ...]:
        limits = [self.max_pixels]
        for _ in range(steps):
            smaller = limits[-1] // 2 // self.limit_step * self.limit_step
            if smaller < self.least_limit:
                break
            limits.append(smaller)
        return tuple(limits)

    def limits_below(self, most: int) -> range:
        """Return the limits below ``most`` in steps of whole windows, from ``min_pixels`` on."""
        least = -(-self.min_pixels // self.limit_step) * self.limit_step
        return range(least, max(least + 1, most), self.limit_step)

    def with_limit(self, limit: int) -> Self:
        return replace(self, **self.knobs(limit))

    def knobs(self, limit: int) -> dict[str, int]:
        """Return the fields of LMDeploy that set the limit: ``max_pixels`` and ``min_pixels``.

        Transformers 5.17 ignores each of the two fields without the other field.
        """
        return {"min_pixels": min(self.min_pixels, limit), "max_pixels": limit}

    def folder_edits(self, limit: int) -> FolderEdits:
        least, most = min(self.min_pixels, limit) * self.frames, limit * self.frames
        size = {"shortest_edge": least, "longest_edge": most}
        # Transformers 5 prefers min_pixels and max_pixels to size; older versions do not read size.
        return FolderEdits({}, {"min_pixels": least, "max_pixels": most, "size": size})

    def lower(self, size: Size, options: Options, to: Allowed) -> Lowered:
        """Return LMDeploy's fields that lower a client's image to the allowed limits.

        The client's own pixel bounds stay as far as the limits allow.
        """
        asked_most = number(options.get("max_pixels"))
        asked_least = number(options.get("min_pixels"))
        limit = min(asked_most if asked_most >= 1 else to.default, to.planned)
        least = min(asked_least if asked_least >= 1 else self.min_pixels, limit)
        fallback = self.largest_limit(to.units) or self.min_pixels
        units = 0
        # A small image that is enlarged to min_pixels is rounded up, and may exceed max_pixels.
        # Each pair of bounds is tried only if the previous pair gives too many units.
        for pair in (
            (least, limit),
            (min(least, self.min_pixels), limit),
            (min(least, self.min_pixels, fallback), min(limit, fallback)),
        ):
            least, limit = pair
            units = self._between(size, least, limit)
            if units <= to.units:
                break
        if to.cap is not None and to.cap < limit:
            capped_least = min(least, self.min_pixels, to.cap)
            capped = self._between(size, capped_least, to.cap)
            if capped < units:
                least, limit, units = capped_least, to.cap, capped
        # Without a client's limit, the default counts as lowered if it would give more units.
        if (
            asked_most < 1
            and self._between(size, min(self.min_pixels, to.default), to.default) > units
        ):
            asked_most = to.default
        changes = [
            (name, options[name] if number(options.get(name)) >= 1 else wanted, value)
            for name, value, wanted in (
                ("max_pixels", limit, asked_most),
                ("min_pixels", least, asked_least),
            )
            if wanted > value
        ]
        return Lowered({"min_pixels": least, "max_pixels": limit}, units, tuple(changes))

    def _between(self, size: Size, least: int, most: int) -> int:
        return replace(self, min_pixels=least, max_pixels=most).units(*size)

    def request_bounds(self, options: Options) -> dict[str, int]:
        """Return the pixel bounds of a request, converted to bounds of one frame.

        For some models LMDeploy counts an image as two frames.
        """
        given = {name: number(options.get(name)) for name in ("min_pixels", "max_pixels")}
        return {name: max(1, value // self.frames) for name, value in given.items() if value >= 1}

    def together(self, knobs: Iterable[Mapping[str, int]]) -> Self:
        """Return the rule with the narrowest pixel bounds of several images of a request."""
        of_images = list(knobs)
        most = min(bounds["max_pixels"] for bounds in of_images)
        least = min(most, *(bounds["min_pixels"] for bounds in of_images))
        return replace(self, min_pixels=least, max_pixels=most)

    @property
    def request_knobs(self) -> dict[str, int]:
        knobs = self.knobs(self.max_pixels)
        return {name: value * self.frames for name, value in knobs.items()}

    @property
    def small_image(self) -> DummyImage:
        return DummyImage((112, 112), {})

    def image_of(self, units: int) -> DummyImage | None:
        """Return an image of ``units``, as square as whole windows allow.

        None if a request cannot set pixel bounds: the preprocessor then resizes every image.
        """
        if not self.client_knobs:
            return None
        count = max(1, units // self.merge**2)
        rows = isqrt(count)
        size = self.edge * (count // rows), self.edge * rows
        return DummyImage(size, {"min_pixels": self.min_pixels, "max_pixels": size[0] * size[1]})

    def grid(self, units: int) -> int | list[int]:
        """Return the time (1), height and width in patches of a grid of about ``units``.

        The grid is as square as whole windows allow.
        """
        wanted = max(self.unit_step, units // self.unit_step * self.unit_step)
        for height in range(isqrt(wanted) // self.merge * self.merge, 1, -self.merge):
            if wanted % height == 0 and wanted // height % self.merge == 0:
                return [1, height, wanted // height]
        return [1, self.merge, wanted // self.merge]

    def _cells(self, limit: int) -> tuple[int, int]:
        return self._worst_units(limit) // self.unit_step, self.edge

    def stretched(self, size: Size, limit: int) -> Size | None:
        rows, columns = self._windows(size, limit, min(self.min_pixels, limit))
        return columns * self.edge, rows * self.edge
