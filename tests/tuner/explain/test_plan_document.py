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
from turbofit.core.plan import Plan
from turbofit.core.units import GIB
from turbofit.memory.account import RATIO_STEPS
from turbofit.memory.engines import LMDEPLOY, engine_named
from turbofit.tuner.choose import make_plan
from turbofit.tuner.resolved_request import ResolvedRequest


def taken(plan: Plan) -> int:
    """Bytes that the engines hold at the most."""
    return sum(max(gpu.peak, gpu.load_peak) - gpu.used for gpu in plan.gpus)


LEAST = {"on": "1xa100-80g", "least": True}


def test_one_short_request_does_not_take_a_large_card():
    plan = turbofit.plan("internvl2-8b", context=4096, **LEAST)
    assert plan.fits
    assert plan.settings.cache_max_entry_count < 0.02
    assert plan.settings.max_batch_size == 1
    assert 4096 <= plan.kv.tokens < 2 * 4096
    assert plan.footprint.taken == (max(plan.gpus[0].peak, plan.gpus[0].load_peak),)
    assert plan.footprint.left > 60 * GIB
    assert "of it beyond the margin, for others; the GPU holds 4 such engines" in plan.verdict
    bound = turbofit.plan("internvl2-8b", context=4096, budget="20GiB", **LEAST)
    assert "GiB of the budget stay free, " in bound.verdict
    assert "GiB of the card beyond the margin, for others" in bound.verdict
    assert bound.footprint.left > 60 * GIB  # what the budget withholds is for others, too
    plain = turbofit.plan("internvl2-8b", on="1xrtx3090")
    assert plain.footprint is UNSET
    assert '"footprint"' not in plain.to_json()


def test_the_engines_that_are_counted_fit_beside_each_other():
    plan = turbofit.plan("internvl2-8b", context=4096, **LEAST)
    count, free = plan.footprint.servers, plan.gpus[0].free
    for number in range(count + 1):
        on = f"1xa100-80g:free={free}"
        another = turbofit.plan("internvl2-8b", on=on, context=4096, least=True)
        assert another.fits is (number < count)
        free -= another.gpus[0].peak - another.gpus[0].used
    poor = turbofit.plan("internvl2-8b", on="1xa100-80g,ram=6GiB", context=4096, least=True)
    assert poor.footprint.servers == 6 * GIB // (poor.host.pinned + poor.host.pageable) < 4


def test_all_requests_of_a_batch_hold_a_whole_context_or_one_of_the_workload():
    plan = turbofit.plan("internvl2-8b", context=4096, concurrency=8, **LEAST)
    assert plan.settings.max_batch_size == 8
    assert plan.kv.tokens >= 8 * 4096
    assert not plan.may_evict()
    short = turbofit.plan("internvl2-8b", **LEAST)
    need = short.limits.image_tokens_per_request
    assert need < short.settings.session_len <= need + 2048
    assert any("session_len" in text and "--context asks" in text for text in short.reasons)


def test_another_goal_or_a_prediction_contradicts_it():
    for goal in ("latency", "context"):
        with pytest.raises(UsageError, match="least decides by memory"):
            turbofit.plan("internvl2-8b", goal=goal, **LEAST)
    with pytest.raises(UsageError, match="a choice of settings"):
        turbofit.predict("internvl2-8b", **LEAST)


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
    assert sum(least.footprint.taken) == taken(least)
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
        tightest = min(least.gpus, key=lambda gpu: gpu.headroom - gpu.margin)
        assert tightest.headroom - tightest.margin < tightest.total // 50
