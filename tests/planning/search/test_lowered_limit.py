"""An image limit that a plan lowers is chosen before all other settings."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace

import turbofit
from tests.sweep import part
from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Plan
from turbofit.model.presets import known_presets, preset_model
from turbofit.planning.plan import plan
from turbofit.planning.request import PlanRequest

_CARDS = ("l4", "rtx3090", "rtx4090", "a10", "t4", "a100", "rtx2080ti", "rtx3060")


def served(planned: Plan) -> tuple[object, ...]:
    """What a plan promises and how its engines keep it, without what was asked and why."""
    engines = [replace(engine, command=None) for engine in planned.engines]
    return planned.promise, engines, planned.host, planned.throughput, planned.usual_image


def drawn(seed: int, count: int) -> Iterator[tuple[PlanRequest, Plan]]:
    """Drawn plans that fit with a lowered image limit."""
    draw = random.Random(seed)
    while count:
        model = draw.choice(known_presets())
        cards = draw.choice((1, 1, 2, 3))
        on = f"{cards}x{draw.choice(_CARDS)}"
        if draw.random() < 0.5:
            on += f":free={draw.randint(6, 40)}GiB"
        elif draw.random() < 0.2:
            on += f"+1x{draw.choice(_CARDS)}"
        asked: dict[str, Any] = {"images": draw.choice((1, 1, 2, 3, 8))}
        if draw.random() < 0.7:
            asked["context"] = draw.choice((1024, 2048, 4096, 8192, 16384, 32768))
        if draw.random() < 0.3:
            asked["goal"] = draw.choice(("latency", "context"))
        if draw.random() < 0.2:
            asked["concurrency"] = draw.randint(2, 8)
        if draw.random() < 0.2:
            asked["queue_images"] = draw.random() < 0.5
        try:
            rule = preset_model(model).image_rule
            if rule is None or not rule.varies_by_limit:
                continue
            request = PlanRequest.of(model=model, on=on, **asked)
            found = plan(request, compares_limits=False)
        except TurbofitError:
            continue
        if found.fits and found.promise.image_limit != rule.checkpoint_limit:
            count -= 1
            yield request, found


@pytest.mark.slow
def test_a_lowered_limit_is_planned_like_the_same_limit_that_a_person_gives() -> None:
    for request, found in drawn(130, part(200, 50)):
        rule = found.model.image_rule
        assert rule is not None
        given = request.changed(**{rule.limit_name: found.promise.image_limit})
        assert served(plan(given, compares_limits=False)) == served(found), given.given()


def test_the_batch_is_for_the_images_that_are_served() -> None:
    """12 requests at once were planned for the images that were wished, 38 with the limit given."""
    lowered = turbofit.plan("internvl2-8b", on="1xl4", context=1024)
    given = turbofit.plan("internvl2-8b", on="1xl4", context=1024, max_dynamic_patch=2)
    assert lowered.promise.image_limit == 2
    assert lowered.requests_at_once >= 38
    assert served(lowered) == served(given)
    assert "max_dynamic_patch 2: the largest that can be served" in " ".join(lowered.reasons)
