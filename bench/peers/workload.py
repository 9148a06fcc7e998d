"""The requests that every setting of a pair is given: the same clients, whatever serves them."""

from __future__ import annotations

from typing import Any

from turbofit.core.images import ImageRule
from turbofit.core.model import Model
from turbofit.core.plan import Plan
from turbofit.rehearse.turbomind.image_overlap import queue
from turbofit.rehearse.turbomind.worst import gate_of

#: Equal images that wait together; vLLM's, at whose forwards nobody has aimed.
QUEUED = 16
ROWS = 8
_TEXT = 32
_NEW = 2
LONG = 32_000
_ROOM = 320  # tokens of text that a request of the queue has at most, rounded up


def image_units(rule: ImageRule) -> int:
    """Units of the worst image that the model's own preprocessor makes, unasked."""
    return rule.worst_units()


def meeting_units(rule: ImageRule, context: int) -> int:
    """Units of the largest image of which two have room in one forward's context."""
    worst = image_units(rule)
    if rule.few_limits:
        return worst
    return min(worst, (context // 2 - _ROOM) * rule.unit_step)


def requests_of(plan: Plan, *, gateway: bool) -> list[dict[str, Any]]:
    """The cases, as the gateway of a plan lets them through, where one stands.

    Images are the model's worst. Where a plan's own limit is lower, the gateway would lower the
    image, and so does this; ``lowered`` tells. Those that are queued are aimed at the forwards of
    the settings that serve them: clients who send long enough meet them so, whatever they are.
    """
    model, cases = plan.model, list[dict[str, Any]]()
    rule = model.image_rule
    if rule is not None:
        one = _vision(rule, min(image_units(rule), plan.limits.units_per_image), _TEXT)
        cases.append({"name": "one image", "requests": [one]})
        most = min(image_units(rule), plan.limits.units_per_image)
        gate = gate_of(plan) if gateway else None
        cases.append({"name": "images that meet", "requests": queue(plan, rule, most, gate)})
    long = {"text_tokens": min(LONG, plan.settings.session_len - _NEW), "max_new_tokens": _NEW}
    cases.append({"name": "long prompt", "requests": [long]})
    row = {"text_tokens": 16, "max_new_tokens": _NEW, "top_k": 0}
    cases.append({"name": "sampling", "requests": [row] * ROWS})
    return cases


def _vision(rule: ImageRule, units: int, text: int) -> dict[str, Any]:
    return {"text_tokens": text, "units": [rule.grid(units)], "max_new_tokens": _NEW}


def lowered(plan: Plan) -> str:
    """What a plan promises less than was asked; empty where nothing."""
    rule, told = plan.model.image_rule, list[str]()
    if rule is not None and plan.limits.units_per_image < image_units(rule):
        told.append(
            f"images lowered to {plan.limits.units_per_image} of {image_units(rule)}"
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
    one = image_units(rule)
    return (
        f"an image of {one} {rule.units_name} ({rule.unit_tokens(one)} tokens) alone, such images"
        f" aimed at the forwards of whoever serves, {text}"
    )
