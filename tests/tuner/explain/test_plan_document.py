"""The least footprint: what is promised is kept, and no plan takes less than is said."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import UNSET
from msgspec.structs import replace

import turbofit
from tests.sweep import part
from tests.tuner.conftest import random_request
from turbofit.core.errors import UsageError
from turbofit.core.plan import Footprint, Plan
from turbofit.core.units import GIB
from turbofit.memory.account import RATIO_STEPS
from turbofit.memory.engines import LMDEPLOY, engine_named
from turbofit.tuner.choose import make_plan
from turbofit.tuner.resolved_request import ResolvedRequest


def taken(plan: Plan) -> int:
    """Bytes that the engines hold at the most."""
    return sum(max(gpu.peak, gpu.load_peak) - gpu.used for gpu in plan.gpus)


def footprint(plan: Plan) -> Footprint:
    assert isinstance(plan.footprint, Footprint)
    return plan.footprint


def test_one_short_request_does_not_take_a_large_card():
    plan = turbofit.plan("internvl2-8b", on="1xa100-80g", context=4096, least=True)
    assert plan.fits
    assert plan.settings.cache_max_entry_count < 0.02
    assert plan.settings.max_batch_size == 1
    assert 4096 <= plan.kv.tokens < 2 * 4096
    found = footprint(plan)
    assert found.taken == (max(plan.gpus[0].peak, plan.gpus[0].load_peak),)
    assert found.left > 60 * GIB
    assert "of it beyond the margin, for others; the GPU holds 4 such engines" in plan.verdict
    bound = turbofit.plan("internvl2-8b", on="1xa100-80g", context=4096, least=True, budget="20GiB")
    assert "GiB of the budget stay free, " in bound.verdict
    assert "GiB of the card beyond the margin, for others" in bound.verdict


def test_the_engines_that_are_counted_fit_beside_each_other():
    plan = turbofit.plan("internvl2-8b", on="1xa100-80g", context=4096, least=True)
    count = footprint(plan).servers
    assert count is not None
    free = plan.gpus[0].free
    for _ in range(count):
        on = f"1xa100-80g:free={free}"
        one = turbofit.plan("internvl2-8b", on=on, context=4096, least=True)
        assert one.fits
        free -= one.gpus[0].peak - one.gpus[0].used
    beyond = f"1xa100-80g:free={free}"
    assert not turbofit.plan("internvl2-8b", on=beyond, context=4096, least=True).fits


def test_host_memory_bounds_the_engines_that_are_counted():
    on = "1xa100-80g,ram=6GiB"
    plan = turbofit.plan("internvl2-8b", on=on, context=4096, least=True)
    need = plan.host.pinned + plan.host.pageable
    assert footprint(plan).servers == 6 * GIB // need < 4


def test_all_requests_of_a_batch_hold_a_whole_context():
    plan = turbofit.plan("internvl2-8b", on="1xa100-80g", context=4096, concurrency=8, least=True)
    assert plan.settings.max_batch_size == 8
    assert plan.kv.tokens >= 8 * 4096
    assert not plan.may_evict()


def test_without_a_context_one_request_of_the_workload_has_room():
    plan = turbofit.plan("internvl2-8b", on="1xa100-80g", least=True)
    need = plan.limits.image_tokens_per_request
    assert need < plan.settings.session_len <= need + 2048
    assert any("session_len" in text and "--context asks" in text for text in plan.reasons)


def test_what_a_budget_withholds_is_left_for_others():
    plan = turbofit.plan("internvl2-8b", on="1xa100-80g", least=True, budget="30GiB")
    gpu = plan.gpus[0]
    assert footprint(plan).left > gpu.total - gpu.reserved - max(gpu.peak, gpu.load_peak) - GIB


def test_a_plan_without_it_says_nothing_of_a_footprint():
    plan = turbofit.plan("internvl2-8b", on="1xrtx3090")
    assert plan.footprint is UNSET
    assert '"footprint"' not in plan.to_json()


@pytest.mark.parametrize("goal", ["latency", "context"])
def test_another_goal_contradicts_it(goal):
    with pytest.raises(UsageError, match="least decides by memory"):
        turbofit.plan("internvl2-8b", on="1xrtx3090", least=True, goal=goal)


def test_a_prediction_has_nothing_to_choose():
    with pytest.raises(UsageError, match="a choice of settings"):
        turbofit.predict("internvl2-8b", on="1xrtx3090", least=True)


@pytest.mark.slow
@given(
    engine=st.sampled_from([engine_named(name) for name in LMDEPLOY]),
    seed=st.integers(0, 10**6),
    context=st.booleans(),
    alone=st.booleans(),
    budget=st.sampled_from([None, 10 * GIB, 24 * GIB]),
)
@settings(max_examples=part(12), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_least_fits_where_a_plan_does_and_takes_no_more(engine, seed, context, alone, budget):
    request = random_request(random.Random(seed), context=context)
    work = replace(request.workload, goal="throughput", queue_images=None)
    if alone:
        work = replace(work, concurrency=None)
    request = replace(request, workload=work, budget=budget)
    try:
        whole, least = (make_plan(one, engine) for one in (request, replace(request, least=True)))
    except UsageError:
        return
    assert Plan.from_json(least.to_json()) == least
    assert least.fits or not whole.fits
    if not whole.fits:
        return
    # Of full cards a step of the ratio may fill a little more than another.
    step = sum(gpu.total for gpu in least.gpus) // RATIO_STEPS if least.may_evict() else 0
    assert taken(least) <= taken(whole) + step
    assert sum(footprint(least).taken) == taken(least)
    keeps_promise(request, least, whole)


def keeps_promise(request: ResolvedRequest, least: Plan, whole: Plan) -> None:
    """Images as large, the context, and as many requests at once, as far as the cards hold them."""
    assert least.limits.units_per_image >= whole.limits.units_per_image
    settings, work = least.settings, request.workload
    assert settings.session_len >= (work.context or least.limits.image_tokens_per_request)
    assert least.kv.longest_request_tokens >= (work.context or 0)
    assert least.requests_at_once >= (work.concurrency or 1)
    if least.may_evict() and settings.cache_max_entry_count < 1 - 1 / RATIO_STEPS:
        # The cache is then as large as memory allows.
        assert all(gpu.headroom - gpu.margin < gpu.total // 50 for gpu in tightest(least))


def tightest(plan: Plan) -> list:
    return [min(plan.gpus, key=lambda gpu: gpu.headroom - gpu.margin)]
