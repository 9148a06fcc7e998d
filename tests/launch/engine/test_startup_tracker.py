"""What an engine's log says beside the plan."""

from __future__ import annotations

from msgspec.structs import replace

from tests.support.plans import plausible_plan
from turbofit.launch.engine.engine_log import StartupTracker

BUDGET = (
    "[TM][INFO][1120.08:30:01.123456][x.cc:1] Object cache budget: {:.2f} MB from free 99999.00 MB "
    "and ratio 0.800"
)


def test_a_cache_beyond_the_plan_is_counted() -> None:
    plan = plausible_plan(gpus=1, tp=1)
    planned = plan.kv.region_bytes / (1 << 20)
    tracker = StartupTracker(plan)
    assert tracker.cache_surplus == 0
    tracker.see(BUDGET.format(planned + 3), 1, 0.0)
    assert abs((tracker.cache_surplus or 0) - (3 << 20)) < 1 << 14
    silent = replace(plan, engine=replace(plan.engine, name="pytorch"))
    assert StartupTracker(silent).cache_surplus is None
    smaller = StartupTracker(plan)
    smaller.see(BUDGET.format(planned - 3), 1, 0.0)
    assert smaller.budget is not None
    assert smaller.cache_surplus == 0
