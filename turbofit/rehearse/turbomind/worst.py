"""The worst cases of a plan, as requests that a rehearsal queues."""

from __future__ import annotations

from turbofit.core.json_types import JsonObject
from turbofit.core.plan import Plan
from turbofit.memory.turbomind.pool import engine_bound
from turbofit.memory.vision_load import vision_load_within
from turbofit.rehearse.mixes import let_through, units_of_request
from turbofit.rehearse.turbomind.image_overlap import queue

_TEXT = 32  # prompt tokens beside the images, about what a chat template adds
NEW_TOKENS = 2  # to generate: one forward of prefill, one of decoding


def worst_cases(plan: Plan) -> list[JsonObject]:
    """The cases of a rehearsal's specification, named as the ledger's transient terms.

    ``vision_request``: one request at the limit. ``vision_forward``: the mix of images, equal or
    not, that brings most units into one forward, of what the gateway lets through at once.
    ``text_prefill``: the longest prompt that the cache and the session hold. ``sampling``: a full
    batch with ``top_k=0``.
    """
    rule, limits, settings = plan.model.image_rule, plan.limits, plan.settings
    cases: list[JsonObject] = []
    images = []
    if rule is not None and limits.vision_unit:
        whole = limits.units_per_image, limits.images_per_request, limits.units_per_request
        images = [rule.grid(units) for units in units_of_request(*whole)]
    if images:
        one = {"text_tokens": _TEXT, "units": images, "max_new_tokens": NEW_TOKENS}
        # The next case asks again about images that are in the prefix cache.
        first = one | {"lead": 1, "images": 1} if settings.enable_prefix_caching else one
        cases.append({"name": "vision_request", "requests": [first]})
        cases.append({"name": "vision_forward", "requests": _meeting(plan)})
    longest = min(settings.session_len, plan.kv.longest_request_tokens) - NEW_TOKENS
    text = {"text_tokens": max(1, longest), "max_new_tokens": NEW_TOKENS}
    cases.append({"name": "text_prefill", "requests": [text]})
    row = {"text_tokens": 16, "max_new_tokens": NEW_TOKENS, "top_k": 0}
    cases.append({"name": "sampling", "requests": [row] * settings.max_batch_size})
    return cases


def _meeting(plan: Plan) -> list[JsonObject]:
    """The requests that bring most units into one forward, of what clients may send at once."""
    assert plan.model.image_rule is not None
    return queue(plan, plan.model.image_rule, plan.limits.units_per_image, gate_of(plan))


def gate_of(plan: Plan) -> int | None:
    """Units that the plan's gateway lets through at once; None where it need not hold any back."""
    rule, limits = plan.model.image_rule, plan.limits
    assert rule is not None
    bound = engine_bound(rule, vision_load_within(limits), plan.settings)
    # What the cache cannot hold at once needs no gate.
    return let_through(limits, min(bound, rule.units_within(plan.kv.tokens)))
