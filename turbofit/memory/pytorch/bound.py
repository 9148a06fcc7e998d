"""The most vision units that the PyTorch engine can bring together in one forward."""

from __future__ import annotations

from turbofit.core.images import ImageRule
from turbofit.core.plan import Settings
from turbofit.memory.vision_load import VisionLoad

__all__ = ["engine_bound"]


def engine_bound(rule: ImageRule, vision_load: VisionLoad, settings: Settings) -> int:
    """The units of all images that can meet, never under.

    Whole prompts join a prefill while their tokens stay within ``max_prefill_token_num``; a longer
    prompt is cut into chunks of that size, never inside an image. Where one of its images is longer
    all its chunks are as long as that one, and smaller images may meet in another. So an image is
    encoded once, and images meet by their tokens only. Source: LMDeploy
    pytorch/paging/prefill_scheduler.py, long_context.py.
    """
    each, tokens = vision_load.units_per_image, settings.max_prefill_token_num
    longest = vision_load.tokens_per_request // max(1, vision_load.images_per_request)
    joined = rule.units_within(tokens, padded=each)
    chunk = rule.units_within(max(tokens, longest), padded=each)
    alone = max(each, min(chunk, vision_load.units_per_request))
    by_batch = settings.max_batch_size * vision_load.units_per_request
    return min(max(alone, joined), by_batch)
