"""A start takes the plan's cache, whatever share of the free memory that is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.support.plans import plausible_plan
from turbofit.core.units import GIB, MIB
from turbofit.launch.engine.launches import RATIO, fitted_ratio, ratio_now, shared_ratio, with_ratio

PLAN = plausible_plan(gpus=1, tp=1)
REGION = PLAN.kv.region_bytes
#: What LMDeploy would find free by the plan when it sizes the cache.
LEFT = REGION / PLAN.settings.cache_max_entry_count


def free(more: int) -> dict[str, int]:
    return {gpu.uuid: gpu.free + more for gpu in PLAN.gpus}


@given(st.integers(-2 * GIB, 60 * GIB))
def test_the_cache_has_the_plans_bytes(more: int) -> None:
    ratio = fitted_ratio(PLAN, 0, free(more))
    assert 0 < ratio < 1
    cache = ratio * (LEFT + more)
    assert 0 <= cache - REGION < (LEFT + more) / 10**6 + 1


def test_where_that_is_not_there_the_ratio_stays() -> None:
    """What is left is less than the cache: the engine sizes what it can, as it would alone."""
    assert fitted_ratio(PLAN, 0, free(-10 * GIB)) == 0.873
    assert fitted_ratio(PLAN, 0, {}) == 0.873
    blocks = replace(PLAN, kv=replace(PLAN.kv, region_bytes=0))  # it counts blocks
    assert fitted_ratio(blocks, 0, free(MIB)) == 0.873
    assert fitted_ratio(PLAN, 0, free(0)) == pytest.approx(0.873, abs=1e-6)


def test_of_several_cards_the_fullest_counts() -> None:
    plan = plausible_plan(gpus=2, tp=2)
    one, two = plan.gpus
    planned = pytest.approx(plan.settings.cache_max_entry_count, abs=1e-6)
    assert fitted_ratio(plan, 0, {one.uuid: one.free, two.uuid: two.free + GIB}) == planned
    assert fitted_ratio(plan, 0, {two.uuid: two.free + GIB}) == planned
    both = {gpu.uuid: gpu.free + GIB for gpu in plan.gpus}
    left = plan.kv.region_bytes / plan.settings.cache_max_entry_count
    lower = pytest.approx(plan.kv.region_bytes / (left + GIB), abs=1e-6)
    assert fitted_ratio(plan, 0, both) == lower
    # A card of which the plan left more may have as much more and less.
    wide = replace(two, total=two.total + 2 * GIB, free=two.free + 2 * GIB)
    plan = replace(plan, gpus=(one, wide))
    now = {one.uuid: one.free + GIB, wide.uuid: wide.free - GIB}
    assert fitted_ratio(plan, 0, now) == lower


def test_a_replica_that_starts_again_looks_at_its_own_cards() -> None:
    plan = plausible_plan(gpus=2, tp=1)
    assert len(plan.parallel.groups) == 2
    assert not plan.by_group
    one, two = plan.gpus
    now = {one.uuid: one.free + GIB, two.uuid: 0}
    planned = plan.settings.cache_max_entry_count
    lower = plan.kv.region_bytes / (plan.kv.region_bytes / planned + GIB)
    assert fitted_ratio(plan, 0, now) == pytest.approx(lower, abs=1e-6)
    assert fitted_ratio(plan, 1, now) == planned


def test_in_the_command_line() -> None:
    assert with_ratio(("a", RATIO, "0.8", "b"), 0.25) == ("a", RATIO, "0.250000", "b")
    assert with_ratio(("a", "b"), 0.25) == ("a", "b")


# What is free of cards that several models share.


PLANNED = PLAN.settings.cache_max_entry_count


def test_on_real_cards_nvml_says_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    (gpu,) = PLAN.gpus
    used = {gpu.index: gpu.total - gpu.reserved - gpu.free}
    monkeypatch.setattr("turbofit.launch.serve.gpu_monitor.used_now", lambda _: used)
    assert shared_ratio(PLAN, 0) == pytest.approx(PLANNED, abs=1e-6)
    used[gpu.index] -= 2 * GIB
    assert shared_ratio(PLAN, 0) < PLANNED
    used.clear()
    assert shared_ratio(PLAN, 0) == PLANNED


def test_what_others_have_yet_to_take_is_not_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    (gpu,) = PLAN.gpus
    used: dict[int, int] = {}
    monkeypatch.setattr("turbofit.launch.serve.gpu_monitor.used_now", lambda _: used)
    assert ratio_now(PLAN, 0) == PLANNED
    # Another turbofit reserved 2 GiB, and holds none of them.
    used[gpu.index] = gpu.total - gpu.reserved - gpu.free - 2 * GIB
    sized = ratio_now(PLAN, 0) * (REGION / PLANNED + 2 * GIB)
    assert REGION <= sized < REGION + gpu.total / 10**6
    # Somebody took half a GiB: the cache has its part of that, and not all is left to the margin.
    used[gpu.index] += 5 * GIB // 2
    assert ratio_now(PLAN, 0) == PLANNED
