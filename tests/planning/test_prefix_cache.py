"""Where a plan has a prefix cache without being asked, and what that may cost."""

from __future__ import annotations

import pytest

import turbofit
from turbofit.core.messages import QUEUED
from turbofit.core.plan import Plan
from turbofit.planning.plan import plan as best_plan
from turbofit.planning.request import PlanRequest
from turbofit.planning.tuned import same_shape
from turbofit.serving.engine.worst_requests import fullest_forward
from turbofit.serving.plan_gateway import bounds_of


def cached(plan: Plan) -> bool:
    return plan.prefix_caching


def row(plan: Plan) -> str:
    return next((reason for reason in plan.reasons if "enable_prefix_caching" in reason), "")


@pytest.mark.parametrize(
    ("model", "on"),
    [
        ("qwen2-vl-2b", "4xrtx3090"),
        ("qwen2.5-vl-7b", "1xrtx3090"),
        ("qwen2.5-7b", "1xrtx3090"),
        ("qwen3-vl-8b", "1xa100-80g"),  # the PyTorch engine
        ("qwen3.5-9b", "1xh100"),
        ("internvl2-8b", "1xl4"),  # images wait for each other, with a cache as without
        ("internvl3.5-8b", "1xl4"),
        ("internvl2-2b", "4xrtx3090"),  # more tiles may meet
        ("internvl3-8b", "1xrtx3090"),
        ("internvl2-26b-awq", "4xrtx3090"),
    ],
)
def test_it_is_on_where_the_promise_stays_and_it_costs_little(model: str, on: str) -> None:
    plan, without = (
        turbofit.plan(model, on=on, **options) for options in ({}, {"enable_prefix_caching": False})
    )
    assert (cached(plan), cached(without)) == (True, False)
    command = plan.engines[0].command
    assert command is not None
    assert "--enable-prefix-caching" in command.argv
    assert plan.promise.context == without.promise.context
    assert plan.promise.image_limit == without.promise.image_limit
    fewest, before = (min(engine.kv.tokens for engine in one.engines) for one in (plan, without))
    assert fewest >= min(before, plan.promise.context)
    assert (QUEUED in plan.warnings) == (QUEUED in without.warnings)
    assert bounds_of(plan).gate == bounds_of(without).gate
    rates = [each.throughput.requests_per_second for each in (plan, without) if each.throughput]
    assert None in rates or rates[0] >= 0.9 * rates[1], "of the largest images, a little more"
    assert "on, as it costs" in row(plan)
    assert not row(without)


def test_what_more_may_meet_is_paid_for_and_tried_by_a_start() -> None:
    plan = turbofit.plan("internvl3-8b", on="1xrtx3090")
    (engine,) = plan.engines
    without = turbofit.plan("internvl3-8b", on="1xrtx3090", enable_prefix_caching=False)
    assert engine.units_per_forward > 3 * without.engines[0].units_per_forward
    assert engine.kv.tokens < without.engines[0].kv.tokens
    tried = fullest_forward(plan, engine, "m", 64)
    assert tried is not None
    assert sum(tried.units) >= 0.99 * engine.units_per_forward


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        ("internvl2-8b", {"on": "1xrtx3090"}, "of the requests/s of new photographs; a follow-up"),
        ("internvl2-8b", {"on": "1xl4", "queue_images": False}, "of the requests/s"),
        # No field of a request makes an image of so many tiles.
        ("internvl3-8b-hf", {"on": "1xrtx3090"}, "more pictures could meet"),
        ("llava-1.5-7b", {"on": "1xa100"}, "LMDeploy switches prefix caching off"),
        ("qwen3.5-9b", {"on": "1xh100", "engine": "pytorch"}, "--prefix-cache-state-budget"),
    ],
)
def test_elsewhere_it_is_off_and_a_row_says_why(model: str, options, why: str) -> None:
    plan = turbofit.plan(model, **options)
    assert not cached(plan)
    assert why in row(plan)
    assert plan.kv_tokens == turbofit.plan(model, enable_prefix_caching=False, **options).kv_tokens
    asked = turbofit.plan(model, enable_prefix_caching=True, **options)
    assert cached(asked), "whatever it costs"
    assert not cached(turbofit.plan(model, least=True, **options))


def test_the_least_memory_and_older_releases_have_none() -> None:
    assert not cached(turbofit.plan("internvl2-2b", on="1xrtx3090", least=True))
    assert not cached(turbofit.plan("internvl2-2b", on="1xrtx3090", lmdeploy="0.14"))


@pytest.mark.parametrize(
    ("model", "on"), [("qwen2-vl-2b", "1xrtx3060"), ("internvl3-8b", "1xrtx3090")]
)
def test_a_plan_that_is_made_again_keeps_it(model: str, on: str) -> None:
    request = PlanRequest.of(model=model, on=on)
    plan = best_plan(request)
    again = same_shape(request, plan, {}, rehearsed=True)
    assert cached(again)
    assert QUEUED not in again.warnings, "nothing waits because of the cache"
    assert again.kv_tokens >= plan.kv_tokens
