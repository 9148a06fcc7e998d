"""The most vision units that TurboMind can bring together in one forward."""

from __future__ import annotations

from turbofit.core.model import ImageRule
from turbofit.core.plan import Settings
from turbofit.memory.exposure import Exposure
from turbofit.memory.turbomind.pool import forward_tokens
from turbofit.model.images import units_within

__all__ = ["engine_bound"]


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
