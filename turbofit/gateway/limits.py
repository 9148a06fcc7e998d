"""What one request may hold: pure functions from a plan and image sizes to LMDeploy's parameters.

Every image that can carry parameters is given explicit ones, whatever the model's default, so that
the limit holds with and without the overlay. Where it cannot (blocks of the Messages API, InternVL
in the Transformers format), it is counted at the default and refused past the plan.
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import UsageError
from turbofit.core.model import DTYPE_BYTES, ImageRule, PatchRule, TileRule
from turbofit.core.plan import Limits
from turbofit.core.struct import Struct
from turbofit.gateway.refusals import Refusal
from turbofit.memory.engines import engine_named
from turbofit.memory.exposure import exposure_within
from turbofit.model.families.internvl import DETAIL_PATCHES
from turbofit.model.images import image_tokens, largest_limit, unit_tokens, units
from turbofit.model.videos import takes_videos

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turbofit.core.plan import Plan

__all__ = [
    "KNOBS", "Bounds", "Held", "bounds_of", "check_images", "check_request", "hold_image",
    "model_default", "number", "shown",
]  # fmt: skip

#: What LMDeploy reads beside an image.
KNOBS: Final = ("max_dynamic_patch", "detail", "min_pixels", "max_pixels")

_SHOWN: Final = 24


class Bounds(Struct):
    """What requests are held to.

    ``overlay`` tells whether the engine runs on a model folder whose default is the plan's limit.
    ``gate`` are the units that may be in flight to one engine, None where the plan paid for the
    engine's own bound. ``gate_to_end``: they stay so until the answer has ended, not only until it
    begins: where the cache does not hold a whole batch of the longest requests, an engine evicts
    one that generates and encodes its images again, beside whatever was let through meanwhile.
    ``bytes_per_unit`` are bytes of host memory while one unit is preprocessed.
    ``watches``: the engine and its model take videos, each in the place of an image. ``default`` is
    the limit of an image without parameters, None where it follows from ``overlay``.
    """

    rule: ImageRule | None
    limits: Limits
    longest_request_tokens: int
    overlay: bool = True
    gate: int | None = None
    gate_to_end: bool = False
    bytes_per_unit: int = 0
    watches: bool = False
    default: int | None = None

    @property
    def beside_images(self) -> int:
        """Bytes of a body that are not images; text past any context need not be tokenised."""
        most = int(self.limits.images_per_request * self.limits.bytes_per_image * 4 / 3)
        return max(1 << 16, self.limits.bytes_per_body - most)


class Held(Struct):
    """One image or video within the plan: LMDeploy's parameters for it, and what it takes.

    ``lowered`` says what was asked beyond the plan, as ``max_dynamic_patch=24->12``. ``words`` are
    text tokens that stand between the frames of a video, beside its ``tokens``.
    """

    knobs: dict[str, int]
    units: int
    tokens: int
    lowered: tuple[str, ...] = ()
    frames: int = 1
    words: int = 0


def bounds_of(plan: Plan, *, overlay: bool = True) -> Bounds:
    """The bounds of a plan.

    Args:
        plan: the plan.
        overlay: whether the engines run on `gateway.overlay`'s folder.
    """
    rule = plan.model.image_rule if plan.limits.vision_unit is not None else None
    gate = _gate(plan, rule)
    return Bounds(
        rule=rule,
        limits=plan.limits,
        longest_request_tokens=plan.kv.longest_request_tokens,
        overlay=overlay,
        gate=gate,
        gate_to_end=gate is not None and plan.may_evict(),
        bytes_per_unit=_bytes_per_unit(plan, rule),
        watches=takes_videos(plan.engine.name, rule),
    )


def model_default(bounds: Bounds) -> int:
    """The limit of an image without parameters: the plan's on an overlay, else the checkpoint's."""
    rule, limits = bounds.rule, bounds.limits
    if bounds.default is not None:
        return bounds.default
    if isinstance(rule, TileRule):
        own, planned = rule.max_dynamic_patch, limits.max_dynamic_patch
    else:
        assert isinstance(rule, PatchRule)
        own, planned = rule.max_pixels, limits.max_pixels_per_image
    return planned if bounds.overlay and planned is not None else own


def hold_image(
    bounds: Bounds, size: tuple[int, int], asked: Mapping[str, Any], *, carries: bool = True
) -> Held:
    """One image, lowered to the plan.

    Both kinds of limit hold: the planned one, and that this very image takes no more units than the
    plan paid for an image. Values that LMDeploy would not read are not obeyed here either.

    Args:
        bounds: the plan's.
        size: width and height in pixels.
        asked: the client's parameters of this image; others than `KNOBS` are not looked at.
        carries: whether its place in the request can carry parameters.

    Raises:
        Refusal: an image that no preprocessor takes, or that cannot be lowered enough.
    """
    rule = bounds.rule
    if rule is None:
        raise Refusal(400, "no_images", "this server was planned without images")
    try:
        if not carries or not rule.client_knobs:
            held = _uncarried(bounds, rule, size, asked)
        elif isinstance(rule, TileRule):
            held = _tiles(bounds, rule, size, asked)
        else:
            held = _patches(bounds, rule, size, asked)
    except UsageError as exc:
        raise Refusal(400, "bad_image_size", f"{exc.message}: {exc.hint}") from None
    most = bounds.limits.units_per_image
    if held.units > most:
        unit = bounds.limits.vision_unit
        raise Refusal(
            400,
            "image_too_large",
            f"an image of {size[0]}x{size[1]} takes {held.units} {unit}s here, {most} are planned "
            f"for; send it smaller, or plan for that size",
        )
    return held


def check_images(bounds: Bounds, count: int) -> None:
    """Refuse too many images before any of them is decoded.

    Raises:
        Refusal: more than planned.
    """
    most = bounds.limits.images_per_request if bounds.rule is not None else 0
    if count > most:
        raise Refusal(
            400,
            "too_many_images" if most else "no_images",
            f"{count} image{'s' * (count > 1)} in a request, {most} planned for"
            if most
            else "this server was planned without images",
        )


def check_request(
    bounds: Bounds, images: Sequence[Held], *, n: int = 1, max_tokens: int | None = None
) -> None:
    """Refuse what no lowering can bring within the plan.

    Args:
        bounds: the plan's.
        images: the images of the request, held.
        n: copies, each of which is a request to the engine.
        max_tokens: tokens of the answer; None where the client sets no limit.

    Raises:
        Refusal: with the number asked and the limit.
    """
    limits = bounds.limits
    check_images(bounds, len(images))
    unit_count, tokens = sum(i.units for i in images), sum(i.tokens for i in images)
    unit = limits.vision_unit
    _within("n", n, limits.n, "copies")
    _within("images", unit_count, limits.units_per_request, f"vision {unit}s in a request")
    _within("images", tokens, limits.image_tokens_per_request, "image tokens in a request")
    tokens += sum(image.words for image in images)
    if bounds.gate is not None:
        _within("n", n * unit_count, bounds.gate, f"vision {unit}s in {n} copies")
    _within(
        "max_tokens",
        tokens + max(1, max_tokens or 1),
        bounds.longest_request_tokens,
        f"tokens ({tokens} of images and max_tokens {max(1, max_tokens or 1)})",
    )


def _within(param: str, number: int, limit: int, what: str) -> None:
    if number > limit:
        raise Refusal(
            400, f"{param}_over_limit", f"{number} {what}, the limit is {limit}", param=param
        )


def _uncarried(
    bounds: Bounds, rule: ImageRule, size: tuple[int, int], asked: Mapping[str, Any]
) -> Held:
    """No parameters can be given: the model's own default decides."""
    most = model_default(bounds)
    bound = (
        {"max_dynamic_patch": most}
        if isinstance(rule, TileRule)
        else {"max_pixels": most, "min_pixels": min(rule.min_pixels, most)}
    )
    count, tokens = units(rule, *size, **bound), image_tokens(rule, *size, **bound)
    dropped = tuple(f"{name}={shown(asked[name])}->default" for name in KNOBS if name in asked)
    return Held(knobs={}, units=count, tokens=tokens, lowered=dropped)


def _tiles(bounds: Bounds, rule: TileRule, size: tuple[int, int], asked: Mapping[str, Any]) -> Held:
    planned = bounds.limits.max_dynamic_patch or rule.max_dynamic_patch
    patch, word = asked.get("max_dynamic_patch"), asked.get("detail")
    detail = word if isinstance(word, str) else ""
    wanted = model_default(bounds)
    if isinstance(patch, int):
        wanted = int(patch)
    elif detail in DETAIL_PATCHES:
        wanted = DETAIL_PATCHES[detail]
    most = max(1, min(wanted, planned))
    count = units(rule, *size, max_dynamic_patch=most)
    if count > bounds.limits.units_per_image:
        most = min(most, largest_limit(rule, bounds.limits.units_per_image) or 1)
        count = units(rule, *size, max_dynamic_patch=most)
    lowered = []
    if number(patch) > most:
        lowered.append(f"max_dynamic_patch={shown(patch)}->{most}")
    elif not isinstance(patch, int) and wanted > most:
        name, value = ("detail", detail) if detail in DETAIL_PATCHES else (KNOBS[0], wanted)
        lowered.append(f"{name}={shown(value)}->{most}")
    return Held(
        knobs={"max_dynamic_patch": most},
        units=count,
        tokens=unit_tokens(rule, count),
        lowered=tuple(lowered),
    )


def _patches(
    bounds: Bounds, rule: PatchRule, size: tuple[int, int], asked: Mapping[str, Any]
) -> Held:
    """Both pixel bounds are given always: Transformers 5.17 ignores one alone."""
    planned = bounds.limits.max_pixels_per_image or rule.max_pixels
    high, low = number(asked.get("max_pixels")), number(asked.get("min_pixels"))
    most = min(high if high >= 1 else model_default(bounds), planned)
    least = min(low if low >= 1 else rule.min_pixels, most)
    fallback = largest_limit(rule, bounds.limits.units_per_image) or rule.min_pixels
    count = 0
    # Raising a small image to min_pixels rounds up, and so may pass max_pixels: each next pair is
    # tried only where the one before takes too much.
    for pair in (
        (least, most),
        (min(least, rule.min_pixels), most),
        (min(least, rule.min_pixels, fallback), min(most, fallback)),
    ):
        least, most = pair
        count = units(rule, *size, max_pixels=most, min_pixels=least)
        if count <= bounds.limits.units_per_image:
            break
    lowered = [
        f"{name}={shown(asked[name])}->{value}"
        for name, value, wanted in (("max_pixels", most, high), ("min_pixels", least, low))
        if wanted > value
    ]
    return Held(
        knobs={"min_pixels": least, "max_pixels": most},
        units=count,
        tokens=unit_tokens(rule, count),
        lowered=tuple(lowered),
    )


def number(value: Any) -> int:
    """A client's value read generously, 0 where it is no number."""
    if isinstance(value, bool):
        return 0
    if isinstance(value, int):
        return value
    if isinstance(value, str) and len(value) <= _SHOWN:
        try:
            value = float(value)
        except ValueError:
            return 0
    return int(value) if isinstance(value, float) and isfinite(value) else 0


def shown(value: Any) -> str:
    """A client's value, safe in a header."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "huge"
    text = str(value)[:_SHOWN] if isinstance(value, str | int | float) else type(value).__name__
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-+") else "?" for c in text)


def _gate(plan: Plan, rule: ImageRule | None) -> int | None:
    """Units in flight where the plan paid for fewer than an engine could bring together."""
    if rule is None or plan.engine.name == "transformers":  # which brings nothing together
        return None
    exposure = exposure_within(plan.limits)
    engine, gates = engine_named(plan.engine.name), []
    for numbers in plan.unlike_groups():
        own = plan.of_group(numbers[0])
        if own.limits.units_per_forward < engine.units_bound(rule, exposure, own.settings):
            gates.append(own.limits.units_per_forward)
    return min(gates, default=None)


def _bytes_per_unit(plan: Plan, rule: ImageRule | None) -> int:
    """Host memory of one unit while it is preprocessed: 32 bits, and 16 of the result."""
    vision = plan.model.vision
    if rule is None or vision is None:
        return 0
    wide = DTYPE_BYTES["float32"] + DTYPE_BYTES["bfloat16"]
    if isinstance(rule, TileRule):
        return vision.channels * rule.tile_size**2 * wide
    return vision.channels * vision.temporal_patch * rule.patch_size**2 * wide
