"""Shares the vision units of a request among its images and its video.

All images get one common limit: the largest limit with which the images fit the plan together. So
small images keep their size, and only the largest images are lowered. If the limit is a number of
tiles, some units may be left over; the newest images get these units. A video counts as one image,
in the vision tower and in host memory. The gateway and `turbofit.pipeline` use these pure
functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import floor
from typing import Final

import msgspec
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.images.rule import LARGEST_PIXELS
from turbofit.core.images.video import GRID_TEXT_TOKENS, LONGEST_SECONDS
from turbofit.core.struct import Options, Struct
from turbofit.core.units import bisect, number
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.request_limits import (
    Bounds,
    LimitedImage,
    RequestedImage,
    hold_image,
    model_default,
    planned_limit,
    shown,
    within,
)
from turbofit.gateway.media.clips import MOST_FRAMES, RATES, Clip

#: The number of frames that LMDeploy samples by default.
_FRAMES: Final = 32
#: The frames a second that LMDeploy assumes for frames that the client sampled itself.
_RATE: Final = 2.0


class SharedImages(Struct):
    """Images that were lowered to the plan.

    ``request`` has the ``mm_processor_kwargs`` for all images together; it may be empty.
    """

    images: tuple[LimitedImage, ...]
    request: dict[str, int] = msgspec.field(default_factory=dict)


def by_request(bounds: Bounds) -> bool:
    """Return whether LMDeploy takes pixel bounds only for all images of a request together."""
    return not bounds.serial and bounds.rule is not None and bounds.rule.by_request


def request_bounds(bounds: Bounds, options: object) -> Options:
    """Return a client's pixel bounds for all images of a request, in pixels of one image.

    ``options`` are the ``image`` options of ``mm_processor_kwargs``. For some models these options
    count an image as two frames.
    """
    if bounds.rule is None or not isinstance(options, dict):
        return {}
    return bounds.rule.request_bounds(options)


def hold_images(
    bounds: Bounds, wanted: Sequence[RequestedImage], beside: Sequence[LimitedImage] = ()
) -> SharedImages:
    """Lower the images of a request, the oldest first, so that they fit the plan together.

    If the images do not fit even with the smallest limit, they get this limit, and `check_request`
    refuses the request. ``beside`` has the request's video, which also uses units.
    """

    @cache
    def limited_at(cap: int | None) -> list[LimitedImage]:
        return [hold_image(bounds, image, cap) for image in wanted]

    def fits(images: Sequence[LimitedImage]) -> bool:
        return within(bounds, (*images, *beside))

    limited, rule = limited_at(None), bounds.rule
    if rule is not None and not fits(limited):
        # All limits below the planned limit, the smallest first. Tiles have each number as a limit;
        # pixels have steps of whole windows of the vision tower, from ``min_pixels`` on.
        caps = rule.limits_below(max(planned_limit(bounds), model_default(bounds)))
        if caps:
            # The largest limit with which the images fit, or the smallest limit.
            best = bisect(lambda place: fits(limited_at(caps[place])), 0, len(caps))[0]
            limited = limited_at(caps[best])
            if rule.few_limits and fits(limited):
                _spend_rest(bounds, wanted, limited, caps[best + 1 :], fits)
    return _with_common_bounds(bounds, wanted, limited)


def hold_media(
    bounds: Bounds,
    wanted: Sequence[RequestedImage],
    hold_video: Callable[[Bounds], LimitedImage] | None,
) -> tuple[SharedImages, tuple[LimitedImage, ...]]:
    """Lower the images of a request by `hold_images`, and its video by ``hold_video``.

    Return the lowered images, and the video in a tuple, which is empty without a video.
    """
    shared = hold_images(bounds, wanted)
    if hold_video is None:
        return shared, ()
    video = hold_video(_beside_images(bounds, shared.images))
    # The video has at least its even share of the units; the images get the rest.
    if not within(bounds, (video, *shared.images)):
        shared = hold_images(bounds, wanted, [video])
    return shared, (video,)


def _beside_images(bounds: Bounds, images: Sequence[LimitedImage]) -> Bounds:
    """Return the bounds for the video of a request.

    The video may use the units that the images leave, but at least an even share of all units.
    """
    limits = bounds.limits
    left = limits.units_per_request - sum(image.units for image in images)
    most = max(left, limits.units_per_request // (len(images) + 1))
    limits = replace(limits, units_per_image=min(limits.units_per_image, most))
    return replace(bounds, promise=replace(bounds.promise, limits=limits))


def check_clips(bounds: Bounds, count: int) -> None:
    """Refuse videos if the plan has none, and several videos in one request.

    LMDeploy takes only one set of video parameters for a request.

    Raises:
        Refusal: the plan has no videos, or there are several.
    """
    if count and not bounds.watches:
        raise Refusal("no_videos", param="messages")
    if count > 1:
        raise Refusal("too_many_videos", count=count, param="messages")


def hold_clip(
    bounds: Bounds, clip: Clip, options: Options
) -> tuple[LimitedImage, dict[str, dict[str, dict[str, float]]]]:
    """Lower one video to the plan; return the video, and LMDeploy's keywords for it.

    The keywords are for the loader and for the processor. The client's options ``num_frames`` and
    ``fps`` are for the loader, and ``max_pixels`` is for the processor; other options are dropped.

    Raises:
        Refusal: the video is too long, or its frames do not fit.
    """
    wanted, rate = _sampled_frames(clip, options), clip.rate
    width, height = clip.size
    # Together the frames may have no more pixels than the largest image.
    frames = min(wanted, MOST_FRAMES, max(1, LARGEST_PIXELS // (width * height)))
    if rate is None and frames < wanted:  # LMDeploy takes all frames that a client sampled
        raise Refusal("too_many_frames", wanted=wanted, width=width, height=height, frames=frames)
    loader: dict[str, float] = {"num_frames": frames}
    if rate is None:
        fps, rate = options.get("fps"), _RATE
        if isinstance(fps, int | float) and RATES[0] <= fps <= RATES[1]:
            rate = float(fps)
        loader["fps"] = rate
    if clip.frames / rate > LONGEST_SECONDS:
        raise Refusal("video_too_long", seconds=clip.frames / rate, most=LONGEST_SECONDS)
    limited, least, most = hold_frames(bounds, frames, clip.size, number(options.get("max_pixels")))
    if clip.rate is not None and frames < min(number(options.get("num_frames")), clip.frames):
        change = f"num_frames={shown(options['num_frames'])}->{frames}"
        limited = replace(limited, lowered=(change, *limited.lowered))
    return limited, {
        "media_io_kwargs": {"video": loader},
        "mm_processor_kwargs": {"video": {"min_pixels": least, "max_pixels": most}},
    }


def hold_frames(
    bounds: Bounds, frames: int, size: tuple[int, int], max_pixels: int = 0
) -> tuple[LimitedImage, int, int]:
    """Lower all frames of a video together to the units that one image may have.

    Return the lowered video, and its new ``min_pixels`` and ``max_pixels``. ``size`` is the width
    and height of a frame in pixels. The parameter ``max_pixels`` is the client's limit for the
    pixels of all frames, or 0.

    Raises:
        Refusal: the frames fit at no size, or are too few for the model.
    """
    rule, paid = bounds.rule, bounds.limits.units_per_image
    assert rule is not None
    videos = rule.videos
    assert videos is not None
    try:
        most = videos.fitting_pixels(frames, *size, paid, most=max_pixels or None)
        if most is None:
            raise Refusal(
                "too_many_frames:units",
                frames=frames,
                width=size[0],
                height=size[1],
                most=paid,
                units=rule.units_name,
            )
        least = videos.least_pixels(frames, most)
        count = videos.most_units(frames, *size, most)
        text_tokens = videos.grids(frames) * GRID_TEXT_TOKENS
    except UsageError as exc:
        raise Refusal("bad_video", cause=exc.message, hint=exc.hint) from None
    # The client's limit, or without one the model's, if this gives the video more units.
    unlowered = max_pixels
    if not unlowered and videos.most_units(frames, *size, videos.rule.max_pixels) > count:
        unlowered = videos.rule.max_pixels
    lowered = (f"max_pixels={unlowered}->{most}",) if unlowered > most else ()
    limited = LimitedImage(
        knobs={}, units=count, tokens=rule.unit_tokens(count), lowered=lowered, frames=frames,
        text_tokens=text_tokens,
    )  # fmt: skip
    return limited, least, most


def _spend_rest(
    bounds: Bounds,
    wanted: Sequence[RequestedImage],
    limited: list[LimitedImage],
    caps: Sequence[int],
    fits: Callable[[Sequence[LimitedImage]], bool],
) -> None:
    """Raise the limits of single images, the newest first, while the request has units left."""
    for cap in (*caps, None):
        for place in reversed(range(len(limited))):
            image = hold_image(bounds, wanted[place], cap)
            more = image.units > limited[place].units
            if more and fits([*limited[:place], image, *limited[place + 1 :]]):
                limited[place] = image


def _with_common_bounds(
    bounds: Bounds, wanted: Sequence[RequestedImage], single: Sequence[LimitedImage]
) -> SharedImages:
    """Replace the pixel bounds of each image by common bounds, for models that need common bounds.

    The common bounds are the tightest, so an image may have fewer units than by its own bounds.
    """
    rule, carried = bounds.rule, [image.knobs for image in single if image.knobs]
    if rule is None or not rule.by_request or not carried:
        return SharedImages(images=tuple(single))
    served = rule.together(carried)
    images = []
    for image, limited in zip(wanted, single, strict=True):
        count = served.units(*image.size) if limited.knobs else limited.units
        images.append(replace(limited, knobs={}, units=count, tokens=rule.unit_tokens(count)))
    default = served == rule.with_limit(model_default(bounds))
    return SharedImages(images=tuple(images), request={} if default else served.request_knobs)


def _sampled_frames(clip: Clip, options: Options) -> int:
    """Return how many frames LMDeploy would sample from a video.

    The result is the smaller of the numbers that ``num_frames`` and ``fps`` allow. If the client
    sampled the frames itself, LMDeploy takes all of them.
    """
    if clip.rate is None:
        return clip.frames
    count = number(options.get("num_frames")) or _FRAMES
    wanted = min(count, clip.frames) if count > 0 else clip.frames
    rate = options.get("fps")
    if isinstance(rate, int | float) and rate > 0:
        wanted = min(wanted, floor(min(rate, RATES[1]) * clip.frames / clip.rate))
    return max(1, wanted)
