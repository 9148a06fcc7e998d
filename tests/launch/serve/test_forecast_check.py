from __future__ import annotations

from msgspec.structs import replace

from tests.support.plans import plausible_plan
from turbofit.core.plan import GroupPlan
from turbofit.launch.serve.start_progress import as_launched


def test_the_gateway_counts_on_no_more_cache_than_the_engines_say_they_have() -> None:
    plan = plausible_plan()
    assert as_launched(plan, {0: plan.kv.tokens + 64}) == plan
    assert as_launched(plan, {0: None}) == plan
    assert as_launched(plan, {0: 4096, 1: 8192}).kv.tokens == 4096


def test_each_group_has_its_own_cache() -> None:
    plan = plausible_plan()
    part = GroupPlan(settings=plan.settings, kv=plan.kv, units_per_forward=13, at_once=1)
    roomy = replace(part, kv=replace(plan.kv, tokens=2 * plan.kv.tokens))
    two = replace(plan, by_group=(part, roomy))
    told = as_launched(two, {0: None, 1: plan.kv.tokens + 64})
    assert [one.kv.tokens for one in told.by_group] == [plan.kv.tokens, plan.kv.tokens + 64]
    assert told.kv.tokens == plan.kv.tokens
