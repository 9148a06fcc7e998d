"""The least footprint: what is promised is kept, and no plan takes less than is said."""

from __future__ import annotations

import pytest
from msgspec import UNSET

import turbofit
from bench.plans.__main__ import least
from tests.sweep import part
from turbofit.core.errors import UsageError
from turbofit.core.plan import Plan
from turbofit.core.units import GIB

LEAST = {"on": "1xa100-80g", "least": True}


def test_one_short_request_does_not_take_a_large_card():
    plan = turbofit.plan("internvl2-8b", context=4096, **LEAST)
    assert plan.fits
    assert plan.engines[0].settings.cache_max_entry_count < 0.02
    assert plan.engines[0].settings.max_batch_size == 1
    assert 4096 <= plan.engines[0].kv.tokens < 2 * 4096
    assert plan.footprint.taken == (max(plan.ledgers[0].peak, plan.ledgers[0].load_peak),)
    assert plan.footprint.left > 60 * GIB
    assert "of it beyond the margin, for others; the GPU holds 4 such engines" in plan.verdict
    bound = turbofit.plan("internvl2-8b", context=4096, budget="20GiB", **LEAST)
    assert "GiB of the budget stay free, " in bound.verdict
    assert "GiB of the card beyond the margin, for others" in bound.verdict
    assert bound.footprint.left > 60 * GIB  # what the budget withholds is for others, too
    assert Plan.from_json(bound.to_json()) == bound
    plain = turbofit.plan("internvl2-8b", on="1xrtx3090")
    assert plain.footprint is UNSET
    assert '"footprint"' not in plain.to_json()


def test_the_engines_that_are_counted_fit_beside_each_other():
    plan = turbofit.plan("internvl2-8b", context=4096, **LEAST)
    count, free = plan.footprint.servers, plan.ledgers[0].free
    for number in range(count + 1):
        on = f"1xa100-80g:free={free}"
        another = turbofit.plan("internvl2-8b", on=on, context=4096, least=True)
        assert another.fits is (number < count)
        free -= another.ledgers[0].peak - another.ledgers[0].used
    poor = turbofit.plan("internvl2-8b", on="1xa100-80g,ram=6GiB", context=4096, least=True)
    assert poor.footprint.servers == 6 * GIB // (poor.host.pinned + poor.host.pageable) < 4


def test_all_requests_of_a_batch_hold_a_whole_context_or_one_of_the_workload():
    plan = turbofit.plan("internvl2-8b", context=4096, concurrency=8, **LEAST)
    assert plan.engines[0].settings.max_batch_size == 8
    assert plan.engines[0].kv.tokens >= 8 * 4096
    assert not plan.may_evict()
    short = turbofit.plan("internvl2-8b", **LEAST)
    need = short.promise.limits.image_tokens_per_request
    assert need < short.engines[0].settings.session_len <= need + 2048
    assert any("session_len" in text and "--context asks" in text for text in short.reasons)


def test_another_goal_or_a_prediction_contradicts_it():
    for goal in ("latency", "context"):
        with pytest.raises(UsageError, match="least decides by memory"):
            turbofit.plan("internvl2-8b", goal=goal, **LEAST)
    with pytest.raises(UsageError, match="a choice of settings"):
        turbofit.predict("internvl2-8b", **LEAST)


@pytest.mark.slow
def test_the_least_fits_where_a_plan_does_keeps_its_promises_and_takes_no_more() -> None:
    ends = list(least(part(40), seed=2))
    assert [why for _, why in ends if why] == []
    assert "both fit" in [end for end, _ in ends]
