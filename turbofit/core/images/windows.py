"""How Qwen's preprocessors resize: to whole windows of patches within bounds on the pixels."""

from __future__ import annotations

from math import ceil, floor, sqrt
from typing import Final

from turbofit.core.errors import UsageError

__all__ = ["LARGEST_RATIO", "windows"]

#: The preprocessors refuse images whose longer side is more than this many times the shorter.
LARGEST_RATIO: Final = 200


def windows(  # noqa: PLR0913 - the numbers of a preprocessor
    width: int, height: int, window: int, largest: int, smallest: int, *, enlarge: bool, what: str,
    frames: int = 1, counted_frames: int = 1,
) -> tuple[int, int]:  # fmt: skip
    """Rows and columns of windows that an image, or each frame of a video, is resized to.

    Args:
        width: pixels, at least 1.
        height: pixels, at least 1.
        window: pixels of a window's side.
        largest: upper bound on the pixels after resizing, of all frames.
        smallest: lower bound.
        enlarge: whether a side below a window is enlarged before anything else.
        what: ``image`` or ``video``, for words.
        frames: that share the bounds.
        counted_frames: as how many of them the bounds are tried first.

    Raises:
        UsageError: longer than 200 : 1, as the preprocessor itself refuses it.
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
