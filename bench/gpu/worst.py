"""How long so many worst-case requests take, and the size at which they end in four minutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from turbofit.core.plan import Plan
from turbofit.memory.engines import engine_named
from turbofit.tuner.speed import card_of, rates, work_of

__all__ = ["SECONDS", "Sized", "attention_flops", "request_seconds", "sized", "sizes", "told"]

#: What a load of worst-case requests may take.
SECONDS = 240.0
#: Beside an image: a question, and the chat template.
_TEXT = 64


class Sized(NamedTuple):
    """A load that ends in time: the limit that images are held to, and how many are asked."""

    plan: Plan
    limit: dict[str, int]
    requests: int
    #: Of all of them, by arithmetic.
    seconds: float


def attention_flops(plan: Plan, units: int) -> float:
    """Products of the tower's attention over one image, which the forecast of speed leaves out."""
    vision = plan.model.vision
    if vision is None:
        return 0.0
    each = plan.model.unit_tower_tokens  # patches see each other, tiles do not
    tokens, times = (units, 1) if each == 1 else (each, units)
    return 4.0 * vision.layers * vision.hidden * tokens**2 * times


def request_seconds(plan: Plan) -> float:
    """GPU seconds of one worst-case request with a short answer. Low where kernels do worse."""
    limits = plan.limits
    work = work_of(plan.model, plan.settings, engine_named(plan.engine.name))
    group = plan.parallel.groups[0]
    card = card_of([gpu for gpu in plan.machine.gpus if gpu.index in group], rates())
    prompt = limits.image_tokens_per_request + _TEXT
    flops = prompt * work.token_flops + prompt**2 / 2 * work.pair_flops
    tower = limits.units_per_request * work.vision_flops
    tower += limits.images_per_request * attention_flops(plan, limits.units_per_image)
    return flops / card.flops + tower / card.vision_flops


def sizes(model: str) -> list[dict[str, int]]:
    """Limits to try, the plan's own first."""
    if model.startswith("internvl"):
        return [{}, *({"max_dynamic_patch": n} for n in (6, 3, 1))]
    if model.startswith("qwen"):
        return [{}, *({"max_pixels": 196 * n} for n in (32768, 16384, 12544, 8192, 4096))]
    return [{}]


def sized(make: Callable[..., Plan], limits: Sequence[dict[str, int]], requests: int) -> Sized:
    """The largest images at which so many requests end in time; then, fewer requests.

    Args:
        make: plans with these limits.
        limits: of images, the largest first.
        requests: how many are wanted.
    """
    for limit in limits:
        plan = make(**limit)
        each = request_seconds(plan)
        if each * requests <= SECONDS:
            return Sized(plan, limit, requests, each * requests)
    fewer = max(1, min(requests, int(SECONDS / each)))
    return Sized(plan, limit, fewer, each * fewer)


def told(one: Sized, wanted: int) -> dict[str, Any]:
    """For a document."""
    limits = one.plan.limits
    return {
        "limit": one.limit, "units_per_request": limits.units_per_request,
        "unit": limits.vision_unit, "wanted": wanted, "requests": one.requests,
        "forecast_seconds": round(one.seconds, 1), "within": SECONDS,
    }  # fmt: skip
