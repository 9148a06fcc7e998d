"""Videos in units of the vision tower, and in tokens of the language model.

A video is an image of many grids: ``merged_frames`` frames become one grid of patches, and each
grid stands in the prompt behind the seconds that it shows.
"""

from __future__ import annotations

from typing import Final

from turbofit.core.errors import UsageError
from turbofit.core.model import ImageRule, PatchRule, VideoRule
from turbofit.model.families.qwen_vl import windows

__all__ = [
    "GRID_TEXT_TOKENS", "LONGEST_SECONDS", "fitting_pixels", "grids", "least_pixels",
    "most_video_units", "takes_videos", "video_units",
]  # fmt: skip

#: Tokens of one grid's words, ``<12345.6 seconds>`` and two marks. Never under, up to:
GRID_TEXT_TOKENS: Final = 12
LONGEST_SECONDS: Final = 99_999.0


def takes_videos(engine: str, rule: ImageRule | None) -> bool:
    """Whether LMDeploy takes videos of such a model on this engine, and turbofit counts them."""
    return engine == "pytorch" and isinstance(rule, PatchRule) and rule.video is not None


def grids(rule: PatchRule, frames: int) -> int:
    """Grids of so many frames; the last frame is repeated to fill one.

    Raises:
        UsageError: fewer frames than one grid merges, which the preprocessor refuses.
    """
    merged = _video(rule).merged_frames
    if frames < merged:
        raise UsageError(
            f"a video of {frames} frame{'s' * (frames != 1)}", hint=f"send {merged} at least"
        )
    return -(-frames // merged)


def video_units(
    rule: PatchRule, frames: int, width: int, height: int, *, max_pixels: int | None = None,
    min_pixels: int | None = None,
) -> int:  # fmt: skip
    """Vision patches of all frames of one video, exactly as the preprocessor makes them.

    Args:
        rule: the model's, with a ``video``.
        frames: as the loader sampled them.
        width: pixels.
        height: pixels.
        max_pixels: of all frames together; None is the checkpoint's own.
        min_pixels: of all frames together; None is the checkpoint's own.

    Raises:
        UsageError: frames that the preprocessor refuses.
    """
    video = _video(rule)
    largest = video.max_pixels if max_pixels is None else max_pixels
    smallest = video.min_pixels if min_pixels is None else min_pixels
    count, window = grids(rule, frames), rule.patch_size * rule.merge
    # Rounded where the grids are rounded up: five frames are judged as four, and become six.
    judged = round(frames / video.merged_frames) * video.merged_frames
    rows, columns = windows(
        width, height, window, largest, smallest, enlarge=True, what="video", frames=frames,
        judged=judged,
    )  # fmt: skip
    return count * rows * columns * rule.merge**2


def fitting_pixels(
    rule: PatchRule, frames: int, width: int, height: int, units: int, *, most: int | None = None
) -> int | None:
    """The largest ``max_pixels``, in whole windows, that keeps a video within so many units.

    It holds for fewer frames of that size as well, since a loader leaves out those that it cannot
    decode: five frames take half as much again as four under the same bound.

    Args:
        rule: the model's, with a ``video``.
        frames: at most.
        width: pixels.
        height: pixels.
        units: what the video may take.
        most: the bound that is asked for; None is the checkpoint's own, which it never exceeds.

    Returns:
        None where not even one window a frame keeps within.

    Raises:
        UsageError: frames that the preprocessor refuses.
    """
    video = _video(rule)
    area = (rule.patch_size * rule.merge) ** 2
    own = video.max_pixels if most is None else min(most, video.max_pixels)
    low, high = 0, max(1, own // area)
    while low < high:
        middle = (low + high + 1) // 2
        if most_video_units(rule, frames, width, height, middle * area) <= units:
            low = middle
        else:
            high = middle - 1
    return low * area if low else None


def most_video_units(rule: PatchRule, frames: int, width: int, height: int, largest: int) -> int:
    """The most patches of so many frames or fewer, under a ``max_pixels`` and its `least_pixels`.

    Raises:
        UsageError: frames that the preprocessor refuses.
    """
    smallest = least_pixels(rule, frames, largest)
    counts = range(_video(rule).merged_frames, frames + 1)
    return max(
        (
            video_units(rule, count, width, height, max_pixels=largest, min_pixels=smallest)
            for count in counts
        ),
        default=grids(rule, frames),
    )


def least_pixels(rule: PatchRule, frames: int, largest: int) -> int:
    """The ``min_pixels`` to give beside a ``max_pixels``: the checkpoint's own, or clearly less.

    Transformers raises ``max_pixels`` to 1.05 x ``min_pixels`` a frame where it caps each frame.
    """
    return max(1, min(_video(rule).min_pixels, largest * 9 // (10 * frames)))


def _video(rule: PatchRule) -> VideoRule:
    if rule.video is None:
        raise UsageError("this model takes no videos", hint="send images")
    return rule.video
