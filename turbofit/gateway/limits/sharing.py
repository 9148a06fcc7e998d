"""Several images of one request: they share its units, each lowered as little as is needed.

One common limit is found for all of them, the largest under which they fit: what is smaller keeps
its size, and the largest are lowered first. What tiles leave over goes to the newest images. Pure,
and the same for the gateway and for `turbofit.pipeline`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from turbofit.core.struct import Struct
from turbofit.core.units import largest
from turbofit.gateway.limits.request_limits import (
    LimitedImage,
    RequestedImage,
    hold_image,
    model_default,
    planned_limit,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.core.json_types import Options
    from turbofit.gateway.limits.request_limits import Bounds

__all__ = [
    "SharedImages",
    "beside_images",
    "by_request",
    "hold_images",
    "request_bounds",
    "within",
]  # fmt: skip


class SharedImages(Struct):
    """The images of a request within the plan.

    ``request`` are ``min_pixels`` and ``max_pixels`` for all of them together, as LMDeploy's
    ``mm_processor_kwargs`` take them; empty where the model's default does.
    """

    images: tuple[LimitedImage, ...]
    request: dict[str, int] = msgspec.field(default_factory=dict)


def by_request(bounds: Bounds) -> bool:
    """Whether LMDeploy takes pixel bounds for all images of a request, and for none alone."""
    return bounds.heeds and bounds.rule is not None and bounds.rule.by_request


def request_bounds(bounds: Bounds, options: object) -> Options:
    """What a client's ``mm_processor_kwargs`` ask of all its images, in pixels of one image.

    Args:
        bounds: of a plan where `by_request` holds.
        options: the client's value of ``image``; LMDeploy counts some models' images as two frames.
    """
    if bounds.rule is None or not isinstance(options, dict):
        return {}
    return bounds.rule.request_bounds(options)


def hold_images(
    bounds: Bounds, wanted: Sequence[RequestedImage], beside: Sequence[LimitedImage] = ()
) -> SharedImages:
    """All images of a request, lowered to the plan and so that they fit it together.

    Args:
        bounds: the plan's.
        wanted: the images, the oldest first.
        beside: what else takes units of the request: its video.

    Returns:
        As small as they can be where even that is too much, which `check_request` refuses.

    Raises:
        Refusal: an image that no preprocessor takes, or that cannot be lowered enough.
    """

    def limited_at(cap: int | None) -> list[LimitedImage]:
        return [hold_image(bounds, image, cap) for image in wanted]

    def fits(images: Sequence[LimitedImage]) -> bool:
        return within(bounds, (*images, *beside))

    limited, rule = limited_at(None), bounds.rule
    if rule is not None and not fits(limited):
        # Below the planned limit, the smallest first: each tile count, or whole windows. A
        # checkpoint's own ``min_pixels`` is never undercut.
        caps = rule.limits_below(max(planned_limit(bounds), model_default(bounds)))
        best, limited = _largest(caps, limited_at, fits)
        if best is not None and rule.few_limits:
            _spend_rest(bounds, wanted, limited, caps[best + 1 :], fits)
    return _together(bounds, wanted, limited)


def beside_images(bounds: Bounds, images: Sequence[LimitedImage]) -> Bounds:
    """The bounds of a request's video: what its images leave, or an even share if that is more."""
    limits = bounds.limits
    left = limits.units_per_request - sum(one.units for one in images)
    most = max(left, limits.units_per_request // (len(images) + 1))
    limits = msgspec.structs.replace(limits, units_per_image=min(limits.units_per_image, most))
    return msgspec.structs.replace(bounds, limits=limits)


def within(bounds: Bounds, images: Sequence[LimitedImage]) -> bool:
    """Whether images of one request fit the plan together."""
    limits = bounds.limits
    unit_count, tokens = sum(one.units for one in images), sum(one.tokens for one in images)
    most = limits.units_per_request if bounds.gate is None else bounds.gate
    return (
        unit_count <= min(most, limits.units_per_request)
        and tokens <= limits.image_tokens_per_request
        and tokens + sum(one.text_tokens for one in images) < bounds.longest_request_tokens
    )


def _largest(
    caps: range,
    limited_at: Callable[[int | None], list[LimitedImage]],
    fits: Callable[[Sequence[LimitedImage]], bool],
) -> tuple[int | None, list[LimitedImage]]:
    """The largest limit under which all fit: its place and the images; the smallest if none does.

    Every answer was tried: a rule whose units do not grow with its limit costs images, not memory.
    """
    if not caps:
        return None, limited_at(None)
    smallest = limited_at(caps[0])
    if not fits(smallest):
        return None, smallest
    place = largest(len(caps) - 1, lambda place: fits(limited_at(caps[place])))
    return place, limited_at(caps[place])


def _spend_rest(
    bounds: Bounds,
    wanted: Sequence[RequestedImage],
    limited: list[LimitedImage],
    caps: Sequence[int],
    fits: Callable[[Sequence[LimitedImage]], bool],
) -> None:
    """Raise single images, a step of the limit after the other, while the units allow it."""
    for cap in (*caps, None):
        for place in reversed(range(len(limited))):
            image = hold_image(bounds, wanted[place], cap)
            more = image.units > limited[place].units
            if more and fits([*limited[:place], image, *limited[place + 1 :]]):
                limited[place] = image


def _together(
    bounds: Bounds, wanted: Sequence[RequestedImage], found: Sequence[LimitedImage]
) -> SharedImages:
    """Bounds of single images as bounds of the request, where only the request can carry them."""
    rule, carried = bounds.rule, [one.knobs for one in found if one.knobs]
    if rule is None or not rule.by_request or not carried:
        return SharedImages(images=tuple(found))
    served = rule.together(carried)
    images = []
    for one, limited in zip(wanted, found, strict=True):
        count = served.units(*one.size) if limited.knobs else limited.units
        images.append(
            msgspec.structs.replace(limited, knobs={}, units=count, tokens=rule.unit_tokens(count))
        )
    default = served == rule.with_limit(model_default(bounds))
    return SharedImages(images=tuple(images), request={} if default else served.request_knobs)
