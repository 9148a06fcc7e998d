"""The limits of one request: pure functions from bounds and image sizes to LMDeploy's parameters.

Every image that can carry parameters gets explicit parameters. So the limit holds for any default
of the model, with and without the overlay. Any other image (in blocks of the Messages API, or for
InternVL in the Transformers format) is counted with the default limit. A request that still exceeds
the plan raises a `Refusal`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.images import AnyImageRule, ImageRule
from turbofit.core.images.rule import Allowed, Size
from turbofit.core.messages import plural
from turbofit.core.promise import Limits, Promise
from turbofit.core.struct import Options, Struct
from turbofit.core.units import GIB
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.gate import KvCache

#: Parameters that LMDeploy reads beside an image.
KNOBS: Final = ("max_dynamic_patch", "detail", "min_pixels", "max_pixels")

_SHOWN: Final = 24
#: The bytes of text for which LMDeploy takes 0.5 s of its event loop. A longer text is allowed only
#: if the session is so long that `_BYTES_PER_TOKEN` allows the text.
_LEAST_TEXT: Final = 256 << 10
#: The most bytes of text for each token of the session. No language has so many bytes a token on
#: average. A text with long runs of one character may have more, and is refused.
_BYTES_PER_TOKEN: Final = 8
#: The most bytes of one token: common vocabularies have tokens of up to 128 spaces, and this is
#: twice as many. A text with more bytes for each token of the session cannot fit.
_LONGEST_TOKEN: Final = 256
#: A body may have at least these bytes beside its images, for tools and names.
_LEAST_BODY: Final = 1 << 16
#: The limit of host memory for images, in bytes, if the free memory of the host is unknown.
UNKNOWN_HOST: Final = 4 * GIB


class EngineBounds(Struct):
    """The limits of one engine.

    - ``units``: the most units in one forward; None if the engine itself has the same limit.
    - ``kv``: the engine's KV cache (see `gate.Gate`).
    - ``share``: the average number of requests that the plan expects.
    """

    units: int | None = None
    kv: KvCache = KvCache()
    share: float = 1.0


class Bounds(Struct):
    """What a plan promises to requests, and the limits of its engines.

    - ``overlay``: the engines run on a model folder whose default limit is the plan's limit.
    - ``answer_tokens``: the most tokens of an answer whose request states no length; 0 if such an
      answer may fill the session.
    - ``bytes_per_unit``: bytes of host memory for the preprocessing of one unit.
    - ``watches``: the engine and its model take videos; a video takes the place of one image.
    - ``serial``: engines answer one request after another, and read no parameters of images.
    - ``vocabulary``: the number of tokens that the model knows, 0 if unknown.
    - ``host_bytes``: the most bytes of host memory for the images of all requests at one engine.
    - ``prefix_caching``: the engines keep what they have read of conversations.
    - ``engines``: the limits of each engine of the plan.
    """

    rule: AnyImageRule | None
    promise: Promise
    overlay: bool = True
    answer_tokens: int = 0
    bytes_per_unit: int = 0
    watches: bool = False
    engine: str = "turbomind"
    vocabulary: int = 0
    serial: bool = False
    host_bytes: int = UNKNOWN_HOST
    prefix_caching: bool = False
    engines: tuple[EngineBounds, ...] = (EngineBounds(),)

    @property
    def limits(self) -> Limits:
        """The promise's limits."""
        return self.promise.limits

    @property
    def gate(self) -> int | None:
        """The most units that every engine takes in one forward; None if no engine has a gate."""
        units = (engine.units for engine in self.engines if engine.units is not None)
        return min(units, default=None)

    def engine_bounds(self, number: int, count: int) -> EngineBounds:
        """Return the limits of one of ``count`` engines.

        Engines that were not planned have equal shares, and the limits that hold for every engine.
        """
        if count == len(self.engines):
            return self.engines[number]
        smallest = min(self.engines, key=lambda engine: engine.kv.tokens)
        return EngineBounds(units=self.gate, kv=smallest.kv)

    @property
    def text_bytes(self) -> int:
        """The most bytes of text that a body may have.

        A longer text is refused before its tokens are counted: the count would take too long, or
        the text cannot fit the session.
        """
        tokens = self.promise.context
        cheap = max(_LEAST_TEXT, _BYTES_PER_TOKEN * tokens)
        return min(cheap, max(_LEAST_BODY, _LONGEST_TOKEN * tokens))

    @property
    def beside_images(self) -> int:
        """The most bytes of a body without its images, when the images have the largest size."""
        images = int(self.limits.images_per_request * self.limits.bytes_per_image * 4 / 3)
        return min(self.text_bytes, max(_LEAST_BODY, self.limits.bytes_per_body - images))


class LimitedImage(Struct):
    """One image or video within the plan: LMDeploy's parameters for it, and its cost.

    ``lowered`` lists changes such as ``max_dynamic_patch=24->12``. A change lowers a client's
    option to the plan, or the model's default if the client gave no option. ``text_tokens`` are the
    tokens of text between the frames of a video, in addition to ``tokens``. ``resize`` is the new
    width and height, in pixels, of a picture that no parameter can limit.
    """

    knobs: dict[str, int]
    units: int
    tokens: int
    lowered: tuple[str, ...] = ()
    frames: int = 1
    text_tokens: int = 0
    resize: tuple[int, int] | None = None


class RequestedImage(Struct):
    """An image of a request: its size in pixels, and the client's options for it.

    ``carries``: the image's place in the request can carry parameters. ``by_request``: the request
    itself can carry pixel bounds for all its images together.
    """

    size: tuple[int, int]
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    carries: bool = True
    by_request: bool = False


def model_default(bounds: Bounds) -> int:
    """Return LMDeploy's limit, in tiles or pixels, of an image without parameters.

    With an overlay this is the plan's limit, else the checkpoint's own limit.
    """
    assert bounds.rule is not None
    return planned_limit(bounds) if bounds.overlay else bounds.rule.checkpoint_limit


def planned_limit(bounds: Bounds) -> int:
    """Return the plan's limit of an image, in tiles or pixels, or else the checkpoint's limit."""
    assert bounds.rule is not None
    return bounds.limits.image_limit or bounds.rule.checkpoint_limit


def hold_image(bounds: Bounds, image: RequestedImage, cap: int | None = None) -> LimitedImage:
    """Lower one image to the planned limit, and to the units that the plan allows for an image.

    ``cap`` is a lower limit, in tiles or pixels, for the images of one request. An image below the
    cap does not change.

    Raises:
        Refusal: the plan allows no images, or this image exceeds the plan at every size.
    """
    rule = bounds.rule
    if rule is None:
        raise Refusal("no_images")
    # The parameters are the image's own, or pixel bounds for all images of the request.
    carried = not bounds.serial and (image.carries if rule.client_knobs else image.by_request)
    hold = _carried if carried else _uncarried
    try:
        limited = hold(bounds, rule, image.size, image.options, cap)
    except UsageError as exc:
        raise Refusal("bad_image_size:model", cause=exc.message, hint=exc.hint) from None
    most = bounds.limits.units_per_image
    if limited.units > most:
        width, height = image.size
        name = plural(limited.units, rule.unit_name)
        raise Refusal(
            "image_too_large", width=width, height=height, units=limited.units, name=name, most=most
        )
    return limited


def check_images(bounds: Bounds, count: int) -> None:
    """Refuse too many images before any image is decoded.

    Raises:
        Refusal: the plan allows fewer images, or no images.
    """
    most = bounds.limits.most_images(bounds.rule)
    if count > most:
        if not most:
            raise Refusal("no_images")
        raise Refusal("too_many_images", count=count, images=plural(count, "image"), most=most)


def check_request(bounds: Bounds, images: Sequence[LimitedImage], *, n: int = 1) -> None:
    """Refuse a request whose lowered images still exceed the plan.

    ``n`` is the request's number of copies.

    Raises:
        Refusal: the images, tokens or copies are too many for the plan.
    """
    check_images(bounds, len(images))
    copies = bounds.limits.copies(images=bool(images))
    demands = [(n, copies, "answers to one request", "n_over_limit"), *_demands(bounds, images, n)]
    for number, limit, what, key in demands:
        if number > limit:
            raise Refusal(key, number=number, what=what, limit=limit, param=key.partition("_")[0])


def within(bounds: Bounds, images: Sequence[LimitedImage]) -> bool:
    return all(number <= limit for number, limit, *_ in _demands(bounds, images, 1))


def _demands(
    bounds: Bounds, images: Sequence[LimitedImage], n: int
) -> Iterator[tuple[int, int, str, str]]:
    """Yield for each resource the amount that a request needs, and the plan's limit.

    Each item is the amount, the limit, the name of the resource, and the key of the refusal.
    """
    limits, key = bounds.limits, "images_over_limit:request"
    unit = "units" if bounds.rule is None else bounds.rule.units_name
    units, tokens = sum(i.units for i in images), sum(i.tokens for i in images)
    yield units, limits.units_per_request, f"vision {unit} in a request", key
    yield tokens, limits.image_tokens_per_request, "image tokens in a request", key
    if bounds.gate is not None:
        yield n * units, bounds.gate, f"vision {unit} for {n} answers", "n_over_limit"
    # At least one token of an answer; `ranges.lower_answer` lowers longer answers.
    least = tokens + sum(image.text_tokens for image in images) + 1
    yield least, bounds.promise.context, "tokens of images and an answer", key


def _uncarried(
    bounds: Bounds, rule: ImageRule, size: Size, options: Options, cap: int | None
) -> LimitedImage:
    """Lower an image that cannot carry parameters, by the model's default limit or a new size.

    The new size is needed if the default limit allows more units than the plan or ``cap`` allows.
    """
    default, most = model_default(bounds), bounds.limits.units_per_image
    served = rule.with_limit(default)
    dropped = [f"{name}={shown(options[name])}->default" for name in KNOBS if name in options]
    units, resize = served.units(*size), None
    if units > most:
        planned = rule.largest_limit(most) or 1
        cap = planned if cap is None else min(cap, planned)
    if cap is not None and cap < default:
        resize = served.size_within(size, cap)
    if resize is not None:
        dropped.append(f"image={size[0]}x{size[1]}->{resize[0]}x{resize[1]}")
        size, units = resize, served.units(*resize)
    elif rule.units(*size) > units:
        dropped.append(f"{rule.limit_name}={rule.checkpoint_limit}->{default}")
    return LimitedImage(
        knobs={}, units=units, tokens=served.tokens(*size), lowered=tuple(dropped), resize=resize
    )


def _carried(
    bounds: Bounds, rule: ImageRule, size: Size, options: Options, cap: int | None
) -> LimitedImage:
    """Lower an image by its own parameters, so that the model's default does not matter."""
    default = max(rule.checkpoint_limit, model_default(bounds))
    to = Allowed(planned_limit(bounds), default, bounds.limits.units_per_image, cap)
    lowered = rule.lower(size, options, to)
    return LimitedImage(
        knobs=lowered.knobs,
        units=lowered.units,
        tokens=rule.unit_tokens(lowered.units),
        lowered=tuple(f"{name}={shown(value)}->{kept}" for name, value, kept in lowered.changes),
    )


def shown(value: Any) -> str:
    """Return a client's value as a short text that is safe in a header."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "huge"
    text = str(value)[:_SHOWN] if isinstance(value, str | int | float) else type(value).__name__
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-+") else "?" for c in text)
