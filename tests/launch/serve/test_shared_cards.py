"""What is free of cards that several models share."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.plans import plausible_plan
from turbofit.core.plan import PlannedEngine
from turbofit.core.units import GIB
from turbofit.launch.engine.launches import SharedCards, ratio_now
from turbofit.pretend.shared import Process, SharedRecord

PLAN = plausible_plan(gpus=1, tp=1)
PLANNED = PLAN.settings.cache_max_entry_count


def process(pid: int, held: int, *, alive: bool = True) -> Process:
    row = (held, *(0,) * 15)
    none = (0,) * 16
    return Process(
        pid=pid, refused_at=0, alive=alive, held=row, context=none, late=none, peak=row,
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
    region = PLAN.kv.region_bytes
    sized = ratio_now(PLAN, 0) * (region / PLANNED + 2 * GIB)
    assert region <= sized < region + gpu.total / 10**6
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
    region = PLAN.kv.region_bytes
    expected = region / (region / PLANNED + more)
    assert cards.ratio(PLAN, 0) == pytest.approx(expected, abs=2e-6)


def test_engines_on_parts_of_a_pretend_machine_have_one_each(tmp_path: Path) -> None:
    cards = SharedCards(tmp_path / "cards")
    halves = plausible_plan(gpus=4, tp=2)
    assert cards.file(halves) is None
    assert cards.ratio(halves, 0) == halves.settings.cache_max_entry_count
    on_torch = replace(PLAN, engine=PlannedEngine(name="pytorch", version="0.18.0"))
    assert cards.file(on_torch) is None
