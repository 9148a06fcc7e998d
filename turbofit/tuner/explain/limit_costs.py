"""What an image limit costs: how much more the same GPUs serve where images are smaller."""

from __future__ import annotations

from collections.abc import Iterator

from turbofit.core.plan import LimitCost
from turbofit.memory.engine import Engine
from turbofit.tuner.resolved_request import ResolvedRequest, vision_load_of
from turbofit.tuner.search.candidates import Evaluation
from turbofit.tuner.search.search import at_limit

__all__ = ["limit_costs"]


def limit_costs(request: ResolvedRequest, best: Evaluation, engine: Engine) -> Iterator[LimitCost]:
    """The plan's limit and the common ones beside it, the largest first.

    Under: with the plan's groups and prefill, where a search for the limit may find better ones.

    Args:
        request: what was asked.
        best: the plan's shape, which fits.
        engine: the engine generation.
    """
    rule, limit = request.model.image_rule, best.shape.limit
    sized = request.workload.image_size is not None
    if rule is None or limit is None or sized or not best.vision_load.units_per_image:
        return
    if not rule.varies_by_limit or request.least:  # the least cache holds no more with any limit
        return
    limits = {limit, *(one for one in rule.common_limits if one <= rule.checkpoint_limit)}
    for one in sorted(limits, reverse=True):
        found = best if one == limit else at_limit(request, best.shape, one, engine)
        if not found.fits:
            continue
        images = vision_load_of(request, one)
        yield LimitCost(
            limit=one,
            option=f"{rule.limit_option} {one}",
            image_tokens=images.tokens_per_request // images.images_per_request,
            kv_tokens=sum(found.of_group(group).kv_tokens for group in found.shape.groups),
            requests_at_once=round(sum(speed.running for speed in found.speeds)),
            requests_per_second=round(sum(s.requests_per_second for s in found.speeds), 4),
            seconds_to_first_token=round(max(s.seconds_to_first_token for s in found.speeds), 3),
        )
