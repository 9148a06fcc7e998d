"""The requests that every setting of a pair is given: the same clients, whatever serves them."""

from __future__ import annotations

from typing import Any

from turbofit.core.model import Model
from turbofit.core.plan import Plan
from turbofit.rehearse.spec import RehearsalCase, RehearsalRequest
from turbofit.rehearse.turbomind.image_overlap import gate_of, queue

ROWS = 8
_TEXT = 32
_NEW = 2
LONG = 32_000


def requests_of(plan: Plan, *, gateway: bool) -> tuple[RehearsalCase, ...]:
    """The cases, as the gateway of a plan lets them through, where one stands.

    Images are the model's worst. Where a plan's own limit is lower, the gateway would lower the
    image, and so does this; ``lowered`` tells. Those that are queued are aimed at the forwards of
    the settings that serve them: clients who send long enough meet them so, whatever they are.
    """
    rule, cases = plan.model.image_rule, dict[str, list[RehearsalRequest]]()
    if rule is not None:
        most = min(rule.worst_units(), plan.limits.units_per_image)
        image: Any = rule.grid(most)
        cases["one image"] = [RehearsalRequest(_TEXT, (image,), max_new_tokens=_NEW)]
        gate = gate_of(plan) if gateway else None
        cases["images that meet"] = queue(plan, rule, most, gate)
    tokens = min(LONG, plan.settings.session_len - _NEW)
    cases["long prompt"] = [RehearsalRequest(tokens, max_new_tokens=_NEW)]
    cases["sampling"] = [RehearsalRequest(16, max_new_tokens=_NEW, top_k=0)] * ROWS
    return tuple(RehearsalCase(name, tuple(requests)) for name, requests in cases.items())


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
