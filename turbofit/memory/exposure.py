"""How much of the vision tower's work clients can ask for: per image, per request, per forward."""

from __future__ import annotations

from turbofit.core.model import ImageRule
from turbofit.core.plan import Settings
from turbofit.core.struct import Struct
from turbofit.memory.turbomind.pool import forward_tokens
from turbofit.model.images import units_within

__all__ = ["NO_IMAGES", "Exposure", "engine_bound"]


class Exposure(Struct):
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


NO_IMAGES = Exposure(units_per_image=0, images_per_request=0, tokens_per_request=0)


def engine_bound(rule: ImageRule, exposure: Exposure, settings: Settings) -> int:
    """The most units that TurboMind can bring together in one forward, never under.

    An image is encoded whole in every forward that schedules at least one of its tokens. Four
    bounds hold at once: the forward's tokens, of which two images cut at its edges need only one
    each; the summed length of the sequences being prefilled, at most ``session_len`` (TurboMind's
    ``max_context_token_num``); the batch; and one request's own limit where the batch is one.
    Source: LMDeploy's scheduler, context_token_resource.h and the encoders' Setup.
    """
    tokens = forward_tokens(settings)
    inside = max(0, tokens - 2)
    edges = 2 * exposure.units_per_image
    by_forward = units_within(rule, inside) + edges
    by_context = units_within(rule, settings.session_len)
    by_batch = settings.max_batch_size * exposure.units_per_request
    bound = max(exposure.units_per_image, min(by_forward, by_context))
    return min(bound, by_batch)
