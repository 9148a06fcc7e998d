"""A start takes the plan's cache, whatever share of the free memory that is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.support.plans import plausible_plan
from turbofit.core.plan import PlannedEngine
from turbofit.core.units import GIB, MIB
from turbofit.launch.engine.launches import RATIO, SharedCards, fitted_ratio, ratio_now, with_ratio
from turbofit.pretend.shared import Process, SharedRecord

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


def process(pid: int, held: int, *, alive: bool = True) -> Process:
    row = (held, *(0,) * 15)
    none = (0,) * 16
    return Process(
        pid=pid, refused_at=0, alive=alive, allocated=row, context=none, late=none, peak=row,
        at_peak=row, pinned_peak=0,
    )  # fmt: skip


def test_on_real_cards_nvml_says_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    (gpu,) = PLAN.gpus
    used = {gpu.index: gpu.total - gpu.reserved - gpu.free}
    monkeypatch.setattr("turbofit.launch.serve.gpu_monitor.used_now", lambda _: used)
    assert SharedCards().ratio(PLAN, 0) == pytest.approx(PLANNED, abs=1e-6)
    used[gpu.index] -= 2 * GIB
    assert SharedCards().ratio(PLAN, 0) < PLANNED
    used.clear()
    assert SharedCards().ratio(PLAN, 0) == PLANNED
    assert SharedCards().file(PLAN) is None


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


def test_on_a_pretend_card_its_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, alive = process(1, 9 * GIB, alive=False), process(2, GIB // 2)
    record = SharedRecord((dead, alive), (GIB,), 0)
    monkeypatch.setattr("turbofit.pretend.shared.read_shared", lambda _: record)
    cards = SharedCards(tmp_path / "cards")
    assert cards.file(PLAN) == tmp_path / "cards"
    # The plan counts only what others hold, and half a GiB is gone.
    (gpu,) = PLAN.gpus
    bare = gpu.total - gpu.reserved - gpu.used
    more = bare - GIB // 2 - gpu.free
    expected = REGION / (REGION / PLANNED + more)
    assert cards.ratio(PLAN, 0) == pytest.approx(expected, abs=2e-6)


def test_engines_on_parts_of_a_pretend_machine_have_one_each(tmp_path: Path) -> None:
    cards = SharedCards(tmp_path / "cards")
    halves = plausible_plan(gpus=4, tp=2)
    assert cards.file(halves) is None
    assert cards.ratio(halves, 0) == halves.settings.cache_max_entry_count
    on_torch = replace(PLAN, engine=PlannedEngine(name="pytorch", version="0.18.0"))
    assert cards.file(on_torch) is None
