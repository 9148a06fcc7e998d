"""The limits of one request that a plan's peak memory covers; the gateway refuses larger requests.

The search lowers the vision load, and so the limits (`search.shapes`); `gateway.limits` checks
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.plan import Limits
from turbofit.core.units import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.memory.account import Account, VisionLoad
    from turbofit.tuner.resolved_request import ResolvedRequest

#: Encoded bytes that one image and one request body may have.
_BYTES_PER_IMAGE: Final = 32 * MIB
_BODY_BESIDE_IMAGES: Final = 4 * MIB
_BASE64: Final = 4 / 3


def limits_of(
    request: ResolvedRequest,
    vision_load: VisionLoad,
    image_limit: int | None,
    accounts: Sequence[Account],
) -> Limits:
    """The limits of a plan; ``image_limit`` is of one image, in tiles or pixels."""
    rule, images = request.model.image_rule, vision_load.images_per_request
    limits = Limits(
        vision_unit=None,
        max_dynamic_patch=None,
        max_pixels_per_image=None,
        images_per_request=images,
        units_per_image=vision_load.units_per_image,
        units_per_request=vision_load.units_per_request,
        units_per_forward=max(account.units_per_forward for account in accounts),
        image_tokens_per_request=vision_load.tokens_per_request,
        n=min(account.settings.max_batch_size for account in accounts),
        bytes_per_image=_BYTES_PER_IMAGE if images else 0,
        bytes_per_body=int(images * _BYTES_PER_IMAGE * _BASE64) + _BODY_BESIDE_IMAGES,
    )
    if rule is None or not vision_load.units_per_image:
        return limits
    return replace(limits, vision_unit=rule.unit_name, **{rule.plan_limit_name: image_limit})
