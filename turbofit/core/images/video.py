"""How Qwen's preprocessors resize images and videos: to whole windows of patches within bounds.

A video is a series of grids: ``merged_frames`` frames become one grid of patches. In the prompt, a
text before each grid says the grid's time in seconds.
"""

from __future__ import annotations

from math import ceil, floor, sqrt
from typing import Final, NamedTuple

from turbofit.core.errors import UsageError
from turbofit.core.struct import Struct
from turbofit.core.units import bisect

#: Tokens of the text before one grid, ``<12345.6 seconds>``, and of two marks: an upper bound for
#: videos of at most LONGEST_SECONDS.
GRID_TEXT_TOKENS: Final = 12
#: The longest video, in seconds, for which this number of tokens holds.
LONGEST_SECONDS: Final = 99_999.0
#: The largest ratio of the longer side to the shorter side that preprocessors accept.
LARGEST_RATIO: Final = 200


class VideoRule(Struct):
    """Qwen3-VL: all frames are resized together to keep the bounds of their pixels.

    Each ``merged_frames`` frames become one grid of patches. The bounds ``min_pixels`` and
    ``max_pixels`` are for all frames of a video together.
    """

    merged_frames: int
    min_pixels: int
    max_pixels: int


class Videos(NamedTuple):
    """Computes the units of a model's videos; a unit is one vision patch.

    Every method raises a UsageError for frames that the preprocessor refuses.
    """

    rule: VideoRule
    patch_size: int
    merge: int

    def grids(self, frames: int) -> int:
        """Return the number of grids of a video; the last frame is repeated to fill a grid.

        Raises:
            UsageError: the frames do not fill one grid.
        """
        merged = self.rule.merged_frames
        if frames < merged:
            noun = "frame" if frames == 1 else "frames"
            raise UsageError(f"a video of {frames} {noun}", hint=f"send {merged} at least")
        return -(-frames // merged)

    def units(
        self, frames: int, width: int, height: int, *, max_pixels: int | None = None,
        min_pixels: int | None = None,
    ) -> int:  # fmt: skip
        """Return the vision patches that the preprocessor makes of all frames together.

        ``frames`` is the number of frames that the loader sampled. ``max_pixels`` and
        ``min_pixels`` are for all frames together, by default the checkpoint's own bounds.
        """
        rule, count, window = self.rule, self.grids(frames), self.patch_size * self.merge
        largest = rule.max_pixels if max_pixels is None else max_pixels
        smallest = rule.min_pixels if min_pixels is None else min_pixels
        # The preprocessor makes grids of whole frames (six of five), but compares fewer frames with
        # the bounds (four of five).
        counted_frames = round(frames / rule.merged_frames) * rule.merged_frames
        rows, columns = windows(
            width, height, window, largest, smallest, enlarge=True, what="video", frames=frames,
            counted_frames=counted_frames,
        )  # fmt: skip
        return count * rows * columns * self.merge**2

    def fitting_pixels(
        self, frames: int, width: int, height: int, units: int, *, most: int | None = None
    ) -> int | None:
        """Return the largest ``max_pixels``, in whole windows, that keeps a video within ``units``.

        The result is also right for a video of fewer frames: a loader leaves out unreadable frames,
        and five frames (checked as four) may have more units than six frames. The result is at most
        ``most``. None if one window for each frame is too much.
        """
        checkpoint_pixels, area = self.rule.max_pixels, (self.patch_size * self.merge) ** 2
        high = min(checkpoint_pixels if most is None else most, checkpoint_pixels) // area

        def fits(count: int) -> bool:
            return self.most_units(frames, width, height, count * area) <= units

        return area * bisect(fits, 0, max(1, high) + 1)[0] or None

    def most_units(self, frames: int, width: int, height: int, largest: int) -> int:
        """Return the most patches of a video of at most ``frames`` frames of this size.

        ``largest`` is the video's ``max_pixels``.
        """
        smallest = self.least_pixels(frames, largest)
        counts = range(self.rule.merged_frames, frames + 1)
        return max(
            (
                self.units(count, width, height, max_pixels=largest, min_pixels=smallest)
                for count in counts
            ),
            default=self.grids(frames),
        )

    def least_pixels(self, frames: int, largest: int) -> int:
        """Return a ``min_pixels`` with which a video keeps its ``max_pixels``, ``largest``.

        A version of Transformers that limits each frame raises ``max_pixels`` to at least
        1.05 x ``min_pixels`` for each frame. The result is too small to raise ``largest``, and at
        most the checkpoint's own ``min_pixels``.
        """
        return max(1, min(self.rule.min_pixels, largest * 9 // (10 * frames)))


def windows(  # noqa: PLR0913 - the numbers of a preprocessor
    width: int, height: int, window: int, largest: int, smallest: int, *, enlarge: bool, what: str,
    frames: int = 1, counted_frames: int = 1,
) -> tuple[int, int]:  # fmt: skip
    """Return rows and columns of windows to which an image, or each frame, is resized.

    ``window`` is the side of a window in pixels. ``largest`` and ``smallest`` are bounds of the
    pixels of all ``frames`` together. The pixels of ``counted_frames`` frames decide whether the
    sides must change for the bounds. ``enlarge``: a side below a window is first enlarged. ``what``
    is ``image`` or ``video``, for messages.

    Raises:
        UsageError: the image is longer than 200 : 1, and the preprocessor refuses such images.
    """
    if enlarge and min(width, height) < window:
        scale = max(window / height, window / width)
        width, height = int(width * scale), int(height * scale)
    if max(width, height) / min(width, height) > LARGEST_RATIO:
        raise UsageError(
            f"{'an' if what == 'image' else 'a'} {what} of {width}x{height} is longer than"
            f" {LARGEST_RATIO}:1",
            hint=f"the model's own preprocessor refuses such {what}s: crop it",
        )
    rows, columns = round(height / window), round(width / window)
    pixels = counted_frames * rows * columns * window * window
    if pixels > largest:
        shrink = sqrt((frames * height * width) / largest)
        rows = max(1, floor(height / shrink / window))
        columns = max(1, floor(width / shrink / window))
    elif pixels < smallest:
        grow = sqrt(smallest / (frames * height * width))
        rows, columns = ceil(height * grow / window), ceil(width * grow / window)
    return rows, columns
