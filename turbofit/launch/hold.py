"""Holds one image to a plan: pure functions from what a client asks to what LMDeploy is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from turbofit.core.model import TileRule
from turbofit.model.images import client_limit, largest_limit, units

if TYPE_CHECKING:
    from turbofit.core.model import ImageRule, PatchRule
    from turbofit.core.plan import Limits

__all__ = ["KNOBS", "held_parameters", "too_many_images"]

#: What LMDeploy reads beside an image.
KNOBS: Final = ("max_dynamic_patch", "detail", "min_pixels", "max_pixels")


def held_parameters(
    rule: ImageRule, limits: Limits, size: tuple[int, int], asked: dict[str, Any]
) -> dict[str, Any]:
    """The parameters of one image: the client's own, lowered where they go beyond the plan.

    Both kinds of limit hold: the planned one, and that this very image takes no more units than the
    plan paid for an image. Values that LMDeploy would not read are not read here either.

    Args:
        rule: the model's rule.
        limits: the plan's.
        size: width and height of the image.
        asked: the client's parameters; others than `KNOBS` are handed through.
    """
    others = {name: value for name, value in asked.items() if name not in KNOBS}
    if isinstance(rule, TileRule):
        return {**others, **_tiles(rule, limits, size, asked)}
    return {**others, **_pixels(rule, limits, size, asked)}


def too_many_images(limits: Limits, count: int) -> str | None:
    """The refusal for a request with so many images, or None."""
    if count <= limits.images_per_request:
        return None
    return (
        f"{count} images in a request, {limits.images_per_request} are planned for; "
        f"plan with images={count}"
    )


def _tiles(
    rule: TileRule, limits: Limits, size: tuple[int, int], asked: dict[str, Any]
) -> dict[str, Any]:
    patch, detail = asked.get("max_dynamic_patch"), asked.get("detail")
    own = client_limit(
        rule,
        max_dynamic_patch=int(patch) if isinstance(patch, int) else None,
        detail=detail if isinstance(detail, str) else None,
    )
    planned = (
        rule.max_dynamic_patch if limits.max_dynamic_patch is None else limits.max_dynamic_patch
    )
    most = max(1, min(own, planned))
    if units(rule, *size, max_dynamic_patch=most) > limits.units_per_image:
        most = largest_limit(rule, limits.units_per_image) or 1
    return {"max_dynamic_patch": most}


def _pixels(
    rule: PatchRule, limits: Limits, size: tuple[int, int], asked: dict[str, Any]
) -> dict[str, Any]:
    """Both bounds are given always: Transformers 5.17 ignores one alone."""
    planned = (
        rule.max_pixels if limits.max_pixels_per_image is None else limits.max_pixels_per_image
    )
    most = min(_positive(asked.get("max_pixels"), rule.max_pixels), planned)
    least = min(_positive(asked.get("min_pixels"), rule.min_pixels), most)
    if units(rule, *size, max_pixels=most, min_pixels=least) > limits.units_per_image:
        # Raising a small image to `min_pixels` rounds up, and so may pass `max_pixels`.
        least = min(least, rule.min_pixels)
    if units(rule, *size, max_pixels=most, min_pixels=least) > limits.units_per_image:
        most = largest_limit(rule, limits.units_per_image) or rule.min_pixels
        least = min(least, most)
    return {"min_pixels": least, "max_pixels": most}


def _positive(value: Any, default: int) -> int:
    if not isinstance(value, int | float) or not value >= 1:
        return default
    return int(min(value, 1 << 40))
