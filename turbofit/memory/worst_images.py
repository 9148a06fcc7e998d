"""The images of one prompt that bring the most vision units into one forward.

The engine decides how images meet (`Engine.worst_images`); the caller gives the images (`Maker`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from msgspec.structs import replace

from turbofit.core.images.rule import DummyImage, ImageRule
from turbofit.core.units import bisect


class Image(NamedTuple):
    """An image by its vision units and tokens.

    ``dummy`` describes the picture that a test request sends for this image. By default the picture
    has no pixels.
    """

    units: int
    tokens: int
    dummy: DummyImage = DummyImage((0, 0), {})


#: A function that makes the image with the most units, within limits of units and of tokens. The
#: result is None if no image is within the limits.
Maker = Callable[[int, int], Image | None]


class Meeting(NamedTuple):
    """The images of one prompt, and the vision units that meet in the prompt's fullest forward."""

    units: int
    images: list[Image]

    @property
    def dummies(self) -> list[DummyImage]:
        return [image.dummy for image in self.images]


class Text(NamedTuple):
    """Tokens of a prompt's text: before its images, around each image, and after them.

    ``slack`` is the possible error of the three numbers.
    """

    before: int
    around: int = 0
    after: int = 0
    slack: int = 0


def image(rule: ImageRule, dummy: DummyImage) -> Image:
    """Return the vision units and tokens that an engine makes of a test request's picture."""
    fields = replace(rule, **dummy.knobs)
    return Image(fields.units(*dummy.size), fields.tokens(*dummy.size), dummy)


def pictures(rule: ImageRule, largest: DummyImage, *, with_fields: bool) -> Maker:
    """Return a function that makes the largest picture within given units and tokens.

    If ``with_fields``, and fields of a request can limit pictures, the function makes pictures of
    any size. Else it makes ``largest`` or smaller pictures.
    """

    def make(units: int, tokens: int) -> Image | None:
        """Return the largest picture within ``units`` and ``tokens``, or None."""
        most = min(units, rule.units_within(max(0, tokens)))
        if most < rule.least_units:
            return None
        dummies = [rule.image_of(most)] if with_fields and rule.client_knobs else []
        if not any(dummies):
            limits = rule.lower_limits() if rule.few_limits else [rule.largest_limit(most)]
            sizes = [rule.worst_size(limit) for limit in limits if limit]
            dummies = [largest, *(DummyImage(size, {}) for size in sizes)]
        made = [image(rule, dummy) for dummy in dummies if dummy is not None]
        fit = [image for image in made if image.units <= units and image.tokens <= tokens]
        return max(fit, key=lambda image: image.units, default=None)

    return make


def side_by_side(make: Maker, units: int, tokens: int, text: Text) -> Meeting:
    """Return whole images that have at most ``units`` and ``tokens`` together, largest first."""
    images: list[Image] = []
    while (image := make(units, tokens - text.around)) is not None:
        images.append(image)
        units, tokens = units - image.units, tokens - image.tokens - text.around
    return Meeting(sum(image.units for image in images), images)


def over_edges(
    make: Maker, units: int, room: int, forward: int, text: Text, share: float = 1.0
) -> Meeting:
    """Return images of one prompt that bring as many units as possible into one forward.

    An image counts whole in each forward that has one of the image's tokens. The fullest forward
    therefore begins with the last tokens of one image, goes on with whole images, and ends with the
    first tokens of another image. The prompt has at most ``room`` tokens, a forward at most
    ``forward`` tokens and ``units`` vision units.

    Three forwards are tried as the fullest: the second, which mostly is; the one after the end of
    the largest image, for images longer than a forward; and the first, for prompts that have only
    one forward. Of the prompts that reach at least ``share`` of the most units, the prompt with the
    smallest images is returned.
    """
    largest, tried = make(units, room), [Meeting(0, [])]
    if largest is None:
        return tried[0]
    slack = text.around + max(1, text.slack)
    ends = text.before + largest.tokens + slack
    for edge in (forward, -(-ends // forward) * forward, 0):  # tokens before the tried forward
        before: list[Image] = []
        place = text.before  # tokens before the next image
        if edge:
            before = _until(make, largest, edge + slack - place, text)
            place += sum(image.tokens + text.around for image in before)
        fullest = before[-1:]  # the image that reaches into the tried forward
        left = units - sum(image.units for image in fullest)
        inside = side_by_side(make, left, min(edge + forward - slack, room) - place, text)
        place += sum(image.tokens + text.around for image in inside.images)
        last = make(left - inside.units, room - place - text.around)
        fullest = [*fullest, *inside.images, *([last] if last is not None else ())]
        if place <= room:
            tried.append(Meeting(sum(image.units for image in fullest), [*before[:-1], *fullest]))
    most = max(meeting.units for meeting in tried) * share
    enough = [meeting for meeting in tried if meeting.units >= most]
    return min(
        enough, key=lambda meeting: max((image.units for image in meeting.images), default=0)
    )


def _until(make: Maker, largest: Image, tokens: int, text: Text) -> list[Image]:
    """Return images that have at least ``tokens`` tokens together, with the smallest surplus.

    The first image may be smaller, for the remainder; the others are copies of ``largest``.
    """
    count, left = divmod(tokens, largest.tokens + text.around)
    images = [largest] * count

    def too_short(tokens: int) -> bool:
        image = make(largest.units, tokens)
        return image is None or image.tokens + text.around < left

    if left > 0:
        first = make(largest.units, bisect(too_short, 0, largest.tokens)[1])
        images = [*filter(None, (first,)), *images]
    return images
