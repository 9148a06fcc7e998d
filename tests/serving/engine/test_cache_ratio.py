"""A start takes the plan's cache, whatever share of the free memory that is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.support.plans import changed, plausible_plan
from turbofit.core.plan import Plan
from turbofit.core.units import GIB, MIB
from turbofit.serving.engine.launches import (
    RATIO,
    fitted_ratio,
    ratio_now,
    shared_ratio,
    with_ratio,
)

PLAN = plausible_plan(gpus=1, tp=1)
REGION = PLAN.engines[0].kv.region_bytes
PLANNED = PLAN.engines[0].settings.cache_max_entry_count
#: What LMDeploy would find free by the plan when it sizes the cache.
LEFT = REGION / PLANNED


def about(ratio: float) -> object:
    return pytest.approx(ratio, abs=1e-6)


def free(more: int, plan: Plan = PLAN) -> dict[str, int]:
    return {gpu.uuid: gpu.free + more for gpu in plan.ledgers}


@given(st.integers(-2 * GIB, 60 * GIB))
def test_the_cache_has_the_plans_bytes(more: int) -> None:
    ratio = fitted_ratio(PLAN, 0, free(more))
    assert 0 < ratio < 1
    assert 0 <= ratio * (LEFT + more) - REGION < (LEFT + more) / 10**6 + 1


def test_where_that_is_not_there_the_ratio_stays() -> None:
    """What is left is less than the cache: the engine sizes what it can, as it would alone."""
    assert fitted_ratio(PLAN, 0, free(-10 * GIB)) == PLANNED == 0.873
    assert fitted_ratio(PLAN, 0, {}) == PLANNED
    blocks = changed(PLAN, kv=replace(PLAN.engines[0].kv, region_bytes=0))  # it counts blocks
    assert fitted_ratio(blocks, 0, free(MIB)) == PLANNED
    assert fitted_ratio(PLAN, 0, free(0)) == about(PLANNED)


def test_of_several_cards_the_fullest_counts() -> None:
    plan = plausible_plan(gpus=2, tp=2)
    one, two = plan.ledgers
    planned = plan.engines[0].settings.cache_max_entry_count
    lower = plan.engines[0].kv.region_bytes / (plan.engines[0].kv.region_bytes / planned + GIB)
    assert fitted_ratio(plan, 0, {one.uuid: one.free, two.uuid: two.free + GIB}) == about(planned)
    assert fitted_ratio(plan, 0, {two.uuid: two.free + GIB}) == about(planned)
    assert fitted_ratio(plan, 0, free(GIB, plan)) == about(lower)
    # A card of which the plan left more may have as much more and less.
    wide = replace(two, total=two.total + 2 * GIB, free=two.free + 2 * GIB)
    now = {one.uuid: one.free + GIB, wide.uuid: wide.free - GIB}
    assert fitted_ratio(changed(plan, ledgers=(one, wide)), 0, now) == about(lower)


def test_a_replica_that_starts_again_looks_at_its_own_cards() -> None:
    plan = plausible_plan(gpus=2, tp=1)
    assert len(plan.engines) == 2
    one, two = plan.ledgers
    now = {one.uuid: one.free + GIB, two.uuid: 0}
    planned = plan.engines[0].settings.cache_max_entry_count
    lower = plan.engines[0].kv.region_bytes / (plan.engines[0].kv.region_bytes / planned + GIB)
    assert fitted_ratio(plan, 0, now) == about(lower)
    assert fitted_ratio(plan, 1, now) == planned


def test_in_the_command_line() -> None:
    assert with_ratio(("a", RATIO, "0.8", "b"), 0.25) == (
        "a",
        RATIO,
        "0.250000",
        "b",
    )
    assert with_ratio(("a", "b"), 0.25) == ("a", "b")


def test_what_is_free_of_cards_that_several_models_share(monkeypatch: pytest.MonkeyPatch) -> None:
    (gpu,) = PLAN.ledgers
    used: dict[int, int] = {}
    monkeypatch.setattr("turbofit.serving.gpu_monitor.used_now", lambda _: used)
    assert shared_ratio(PLAN, 0) == ratio_now(PLAN, 0) == PLANNED
    used[gpu.index] = gpu.total - gpu.reserved - gpu.free
    assert shared_ratio(PLAN, 0) == about(PLANNED)
    used[gpu.index] -= 2 * GIB
    assert shared_ratio(PLAN, 0) < PLANNED
    # Another turbofit reserved 2 GiB, and holds none of them.
    sized = ratio_now(PLAN, 0) * (REGION / PLANNED + 2 * GIB)
    assert REGION <= sized < REGION + gpu.total / 10**6
    # Somebody took half a GiB: the cache has its part of that, and not all is left to the margin.
    used[gpu.index] += 5 * GIB // 2
    assert ratio_now(PLAN, 0) == PLANNED
