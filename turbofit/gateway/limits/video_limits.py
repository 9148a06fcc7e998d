"""What a video may hold: it takes the place of one image, in the tower and in host memory."""

from __future__ import annotations

from math import floor
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.images.video import GRID_TEXT_TOKENS, LONGEST_SECONDS
from turbofit.core.units import number
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.request_limits import LimitedImage, shown
from turbofit.gateway.media.clips import MOST_FRAMES, RATES
from turbofit.gateway.media.pictures import LARGEST_PIXELS

if TYPE_CHECKING:
    from turbofit.core.json_types import Options
    from turbofit.gateway.limits.request_limits import Bounds
    from turbofit.gateway.media.clips import Clip

__all__ = ["check_clips", "hold_clip", "hold_frames"]

#: What LMDeploy samples where a client says nothing.
_FRAMES: Final = 32
#: LMDeploy's rate of frames that the client sampled itself.
_RATE: Final = 2.0


def check_clips(bounds: Bounds, count: int) -> None:
    """Refuse videos before any of them is opened.

    LMDeploy takes parameters for all videos of a request together, so one can be held and no more.

    Raises:
        Refusal: a video where none was planned for, or a second one.
    """
    if count and not bounds.watches:
        raise Refusal("no_videos", param="messages")
    if count > 1:
        raise Refusal("too_many_videos", count=count, param="messages")


def hold_clip(
    bounds: Bounds, clip: Clip, options: Options
) -> tuple[LimitedImage, dict[str, dict[str, dict[str, float]]]]:
    """One video, lowered to the plan.

    Of the client's options ``num_frames`` and ``fps`` are for the loader, ``max_pixels`` for the
    processor; others are not passed on.

    Returns:
        What it takes, and LMDeploy's keywords for loader and processor of the request.

    Raises:
        Refusal: a video that no preprocessor takes, or that cannot be lowered enough.
    """
    wanted = _wanted(clip, options)
    frames = min(wanted, MOST_FRAMES, max(1, LARGEST_PIXELS // (clip.size[0] * clip.size[1])))
    if clip.rate is None and frames < wanted:
        raise Refusal(
            "too_many_frames", wanted=wanted, width=clip.size[0], height=clip.size[1], frames=frames
        )
    loader: dict[str, float] = {"num_frames": frames}
    rate = clip.rate
    if rate is None:
        rate = loader["fps"] = _rate(options)
    if clip.frames / rate > LONGEST_SECONDS:
        raise Refusal("video_too_long", seconds=clip.frames / rate)
    limited, least, most = hold_frames(bounds, frames, clip.size, number(options.get("max_pixels")))
    if (
        number(options.get("num_frames")) > frames
        and clip.rate is not None
        and frames < clip.frames
    ):
        said = f"num_frames={shown(options['num_frames'])}->{frames}"
        limited = replace(limited, lowered=(said, *limited.lowered))
    return limited, {
        "media_io_kwargs": {"video": loader},
        "mm_processor_kwargs": {"video": {"min_pixels": least, "max_pixels": most}},
    }


def hold_frames(
    bounds: Bounds, frames: int, size: tuple[int, int], max_pixels: int = 0
) -> tuple[LimitedImage, int, int]:
    """So many frames of one size, within what the plan paid for one image.

    Args:
        bounds: the plan's, which ``watches``.
        frames: as they were sampled.
        size: width and height in pixels.
        max_pixels: of all frames; 0 asks for the model's own.

    Returns:
        What they take, and the ``min_pixels`` and ``max_pixels`` that hold them to it.

    Raises:
        Refusal: frames that no preprocessor takes, or too many.
    """
    rule, limits = bounds.rule, bounds.limits
    assert rule is not None
    videos = rule.videos
    assert videos is not None
    try:
        most = videos.fitting_pixels(frames, *size, limits.units_per_image, most=max_pixels or None)
        if most is None:
            raise Refusal(
                "too_many_frames:units",
                frames=frames,
                width=size[0],
                height=size[1],
                most=limits.units_per_image,
                units=rule.units_name,
            )
        least = videos.least_pixels(frames, most)
        count = videos.most_units(frames, *size, most)
        text_tokens = videos.grids(frames) * GRID_TEXT_TOKENS
    except UsageError as exc:
        raise Refusal("bad_video", cause=exc.message, hint=exc.hint) from None
    lowered = (f"max_pixels={max_pixels}->{most}",) if max_pixels > most else ()
    limited = LimitedImage(
        knobs={}, units=count, tokens=rule.unit_tokens(count), lowered=lowered, frames=frames,
        text_tokens=text_tokens,
    )  # fmt: skip
    return limited, least, most


def _wanted(clip: Clip, options: Options) -> int:
    """Frames that LMDeploy would sample: the fewer of a number and a rate, all of a sequence."""
    if clip.rate is None:
        return clip.frames
    count = number(options.get("num_frames")) or _FRAMES
    wanted = min(count, clip.frames) if count > 0 else clip.frames
    rate = options.get("fps")
    if isinstance(rate, int | float) and rate > 0:
        wanted = min(wanted, floor(min(rate, RATES[1]) * clip.frames / clip.rate))
    return max(1, wanted)


def _rate(options: Options) -> float:
    rate = options.get("fps")
    known = isinstance(rate, int | float) and RATES[0] <= rate <= RATES[1]
    return float(rate) if known and rate is not None else _RATE
