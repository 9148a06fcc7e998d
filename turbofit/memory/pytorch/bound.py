"""The most vision units that the PyTorch engine can bring together in one forward."""

from __future__ import annotations

from typing import NamedTuple

from turbofit.core.images import ImageRule
from turbofit.core.plan import Settings
from turbofit.memory.vision_load import VisionLoad

__all__ = ["UnitsMet", "engine_bound", "units_met"]


class UnitsMet(NamedTuple):
    """Units of the images of one forward, and of the next, which is sent while the first runs."""

    now: int
    next: int


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


def units_met(rule: ImageRule, vision_load: VisionLoad, settings: Settings) -> UnitsMet:
    """What a forward's peak pays for, never under.

    The engine schedules a forward and sends its pixels to the card while the one before runs. A
    gateway that holds clients to fewer units than can meet leaves none for the next forward. An
    image that is longer than ``max_prefill_token_num`` does not follow another request's: a chunk
    of text goes before it. Source: LMDeploy pytorch/engine/engine_loop.py (_prefetch_next_inputs).
    """
    bound = engine_bound(rule, vision_load, settings)
    now = vision_load.budgeted_units(bound)
    if now < bound:
        return UnitsMet(now, 0)
    tokens = settings.max_prefill_token_num
    following = rule.units_within(tokens, padded=vision_load.units_per_image)
    following = min(following, (settings.max_batch_size - 1) * vision_load.units_per_request)
    if vision_load.images_per_request > 1:
        # The next chunk of the same request.
        rest = vision_load.units_per_request - vision_load.units_per_image
        following = max(following, min(bound, rest))
    return UnitsMet(now, following)
