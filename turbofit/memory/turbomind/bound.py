"""The most vision units that TurboMind can bring together in one forward."""

from __future__ import annotations

from turbofit.core.images import ImageRule
from turbofit.core.plan import Settings
from turbofit.memory.turbomind.pool import forward_tokens
from turbofit.memory.vision_load import VisionLoad

__all__ = ["engine_bound"]


def engine_bound(rule: ImageRule, vision_load: VisionLoad, settings: Settings) -> int:
    """The most units that TurboMind can bring together in one forward, never under.

    An image is encoded whole in every forward that schedules at least one of its tokens. Four
    bounds hold at once: the forward's tokens, of which two images cut at its edges need only one
    each; the summed length of the sequences being prefilled, at most ``session_len`` (TurboMind's
    ``max_context_token_num``); the batch; and one request's own limit where the batch is one.
    With prefix caching the first does not hold: each of many questions about a picture that was
    seen before resumes at a block's edge, most often among the picture's last tokens, so that a few
    tokens a request bring it back whole (rehearsed: 104 tiles for a hundred tokens).
    Source: LMDeploy's scheduler, context_token_resource.h and the encoders' Setup.
    """
    by_context = rule.units_within(settings.session_len)
    by_batch = settings.max_batch_size * vision_load.units_per_request
    bound = by_context
    if not settings.enable_prefix_caching:
        inside = max(0, forward_tokens(settings) - 2)
        bound = min(bound, rule.units_within(inside) + 2 * vision_load.units_per_image)
    return min(max(vision_load.units_per_image, bound), by_batch)
