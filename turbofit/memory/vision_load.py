"""How much of the vision tower's work clients can ask for: per image, per request, per forward."""

from __future__ import annotations

from turbofit.core.plan import Limits
from turbofit.core.struct import Struct

__all__ = ["NO_IMAGES", "VisionLoad", "vision_load_within"]


class VisionLoad(Struct):
    """Units (tiles or patches) that the peak must pay for.

    ``tokens_per_request`` are image tokens of one request at its limit; ``units_per_forward`` is
    None for the engine's own bound.
    """

    units_per_image: int
    images_per_request: int
    tokens_per_request: int
    units_per_forward: int | None = None

    @property
    def units_per_request(self) -> int:
        """Units of one request at its limit."""
        return self.units_per_image * self.images_per_request

    def budgeted_units(self, bound: int) -> int:
        """Units of a forward that the peak pays for: the engine's bound, or the plan's if less."""
        return bound if self.units_per_forward is None else min(bound, self.units_per_forward)


def vision_load_within(limits: Limits) -> VisionLoad:
    """What clients can ask of a plan's engines, whatever its peak pays for."""
    return VisionLoad(
        units_per_image=limits.units_per_image,
        images_per_request=limits.images_per_request,
        tokens_per_request=limits.image_tokens_per_request,
    )


NO_IMAGES = VisionLoad(units_per_image=0, images_per_request=0, tokens_per_request=0)
