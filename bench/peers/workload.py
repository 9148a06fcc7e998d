"""The requests that every setting of a pair is given: the same clients, whatever serves them."""

from __future__ import annotations

import dataclasses
from typing import Any

from turbofit.core.model import Model
from turbofit.core.plan import Plan
from turbofit.rehearse.turbomind.image_overlap import gate_of, queue

ROWS = 8
_TEXT = 32
_NEW = 2
LONG = 32_000


def requests_of(plan: Plan, *, gateway: bool) -> list[dict[str, Any]]:
    """The cases, as the gateway of a plan lets them through, where one stands.

    Images are the model's worst. Where a plan's own limit is lower, the gateway would lower the
    image, and so does this; ``lowered`` tells. Those that are queued are aimed at the forwards of
    the settings that serve them: clients who send long enough meet them so, whatever they are.
    """
    model, cases = plan.model, list[dict[str, Any]]()
    rule = model.image_rule
    if rule is not None:
        most = min(rule.worst_units(), plan.limits.units_per_image)
        one = {"text_tokens": _TEXT, "units": [rule.grid(most)], "max_new_tokens": _NEW}
        cases.append({"name": "one image", "requests": [one]})
        gate = gate_of(plan) if gateway else None
        met = [dataclasses.asdict(request) for request in queue(plan, rule, most, gate)]
        cases.append({"name": "images that meet", "requests": met})
    long = {"text_tokens": min(LONG, plan.settings.session_len - _NEW), "max_new_tokens": _NEW}
    cases.append({"name": "long prompt", "requests": [long]})
    row = {"text_tokens": 16, "max_new_tokens": _NEW, "top_k": 0}
    cases.append({"name": "sampling", "requests": [row] * ROWS})
    return cases


def lowered(plan: Plan) -> str:
    """What a plan promises less than was asked; empty where nothing."""
    rule, told = plan.model.image_rule, list[str]()
    if rule is not None and plan.limits.units_per_image < rule.worst_units():
        told.append(
            f"images lowered to {plan.limits.units_per_image} of {rule.worst_units()}"
            f" {plan.limits.vision_unit}s"
        )
    if plan.settings.session_len - _NEW < LONG:
        told.append(f"session of {plan.settings.session_len}")
    return ", ".join(told)


def sent(model: Model) -> str:
    """What a pair's engines were sent, in words."""
    rule = model.image_rule
    text = f"{ROWS} rows with top_k=0, a prompt of {LONG} tokens"
    if rule is None:
        return text
    one = rule.worst_units()
    return (
        f"an image of {one} {rule.units_name} ({rule.unit_tokens(one)} tokens) alone, such images"
        f" aimed at the forwards of whoever serves, {text}"
    )
