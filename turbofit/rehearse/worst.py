"""The worst cases of a plan, as requests that a rehearsal queues."""

from __future__ import annotations

import math
from typing import Any

from turbofit.core.plan import Limits, Plan

_TEXT = 32  # prompt tokens beside the images, about what a chat template adds
_NEW = 2  # tokens to generate: one forward of prefill, one of decoding


def grid(patches: int) -> list[int]:
    """A grid (t, h, w) of about so many patches, as square as even sides allow."""
    wanted = max(4, patches // 4 * 4)
    for height in range(2 * (math.isqrt(wanted) // 2), 1, -2):
        if wanted % height == 0 and wanted // height % 2 == 0:
            return [1, height, wanted // height]
    return [1, 2, wanted // 2]


def _unit(limits: Limits, size: int) -> Any:
    return size if limits.vision_unit == "tile" else grid(size)


def _images(limits: Limits) -> list[Any]:
    """The images of the worst request: whole ones, and what is left of its units."""
    left, units = limits.units_per_request, list[Any]()
    while left > 0 and len(units) < limits.images_per_request:
        size = min(left, limits.units_per_image)
        units.append(_unit(limits, size))
        left -= size
    return units


def worst_cases(plan: Plan) -> list[dict[str, Any]]:
    """The cases of a rehearsal's specification, named as the ledger's transient terms.

    ``vision_request``: one request at the limit. ``vision_forward``: so many of them queued, with
    prompts of different lengths, that their images meet in forwards in many ways.
    ``text_prefill``: the longest prompt that the cache and the session hold. ``sampling``: a full
    batch with ``top_k=0``.
    """
    limits, settings = plan.limits, plan.settings
    cases: list[dict[str, Any]] = []
    images = _images(limits) if limits.vision_unit and limits.units_per_request else []
    if images:
        one = {"text_tokens": _TEXT, "units": images, "max_new_tokens": _NEW}
        meet = -(-limits.units_per_forward // max(1, limits.units_per_request))
        many = max(1, min(settings.max_batch_size, 3 * meet))
        cases.append({"name": "vision_request", "requests": [one]})
        queue = [one | {"text_tokens": 2 + 61 * i % 257} for i in range(many)]
        cases.append({"name": "vision_forward", "requests": queue})
    longest = min(settings.session_len, plan.kv.longest_request_tokens) - _NEW
    text = {"text_tokens": max(1, longest), "max_new_tokens": _NEW}
    cases.append({"name": "text_prefill", "requests": [text]})
    row = {"text_tokens": 16, "max_new_tokens": _NEW, "top_k": 0}
    cases.append({"name": "sampling", "requests": [row] * settings.max_batch_size})
    return cases
