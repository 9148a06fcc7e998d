"""Others who grow into the margin, and memory that must come back; on a stand-in NVML."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.support.nvml import LOST, Process, Scenario, gpu_3090, in_process
from tests.support.plans import plausible_plan
from tests.support.waiting import HANG
from turbofit.core.errors import DoesNotFitError
from turbofit.core.plan import Plan
from turbofit.core.units import GIB, MIB
from turbofit.launch.serve import gpu_monitor as module
from turbofit.launch.serve.gpu_monitor import (
    GpuMonitor,
    any_lost,
    memory_back,
    used_now,
    without,
)
from turbofit.launch.serve.leases import Leases
from turbofit.launch.serve.planner import Planner
from turbofit.machine import nvml
from turbofit.planning.request import PlanRequest

ENGINE = 20 * GIB


class Ground:
    """A machine whose scenario may change, and a plan for it."""

    def __init__(self, scenario: Scenario, path: Path, plan: Plan, engine: int) -> None:
        self.scenario, self.path, self.plan, self.engine = scenario, path, plan, engine
        self.warned: list[tuple[str, str]] = []
        self.heard = threading.Event()

    def change(self) -> None:
        self.scenario.write(self.path)

    def warn(self, kind: str, text: str) -> None:
        self.warned.append((kind, text))
        self.heard.set()

    def wait(self) -> str:
        assert self.heard.wait(HANG)
        return self.warned[-1][1]


@pytest.fixture
def ground(nvml_library: Path, tmp_path: Path) -> Iterator[Ground]:
    engine = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    card = gpu_3090(0)
    card.used = ENGINE
    card.compute.append(Process(engine.pid, ENGINE, "python"))
    scenario = Scenario(gpus=[card])
    plan = plausible_plan(gpus=1, tp=1)
    ledger = msgspec.structs.replace(
        plan.gpus[0], uuid=card.uuid, used=0, headroom=400 * MIB, margin=256 * MIB
    )
    plan = msgspec.structs.replace(plan, gpus=(ledger,))
    with in_process(nvml_library, scenario, tmp_path) as path:
        yield Ground(scenario, path, plan, engine.pid)
    engine.kill()
    engine.communicate()


@pytest.fixture
def gpu_monitor(ground: Ground) -> GpuMonitor:
    """Looks when it is told to."""
    return GpuMonitor(ground.plan, lambda: [ground.engine], ground.warn, every=0.02)


def grow(ground: Ground, size: int) -> None:
    card = ground.scenario.gpus[0]
    card.compute[1:] = [Process(os.getpid(), size, "python3")] if size else []
    card.used = ENGINE + size
    ground.change()


def test_each_step_into_the_margin_is_said_once(gpu_monitor: GpuMonitor, ground: Ground) -> None:
    def said(size: int) -> list[str]:
        grow(ground, size)
        before = len(ground.warned)
        gpu_monitor.look()
        gpu_monitor.look()
        return [text for _, text in ground.warned[before:]]

    assert said(100 * MIB) == []
    card = ground.scenario.gpus[0]
    card.compute[0].size += 2 * GIB  # what our own engine grows by is ours
    card.used += 2 * GIB
    ground.change()
    gpu_monitor.look()
    assert ground.warned == []
    card.compute[0].size -= 2 * GIB
    (text,) = said(200 * MIB)
    assert f"[{os.getpid()}] took 200 MiB on GPU 0" in text
    assert "200 MiB of the margin are left" in text
    (text,) = said(500 * MIB)
    assert "a worst-case request would now kill the engine" in text
    assert said(0) == []
    assert len(said(200 * MIB)) == 1


def test_whether_others_have_all_that_was_left_outlives_the_engine(
    gpu_monitor: GpuMonitor, ground: Ground
) -> None:
    def taken(size: int) -> bool:
        grow(ground, size)
        gpu_monitor.look()
        return gpu_monitor.without_headroom(["GPU-of-another-engine", ground.scenario.gpus[0].uuid])

    found = [taken(size) for size in (200 * MIB, 500 * MIB)]
    # The engine ends of it: NVML shows no more what was whose.
    card = ground.scenario.gpus[0]
    card.compute, card.used = card.compute[1:], 500 * MIB
    ground.change()
    gpu_monitor.look()
    found.append(gpu_monitor.without_headroom([card.uuid]))
    assert found == [False, True, True]
    assert not gpu_monitor.without_headroom(["GPU-of-another-engine"])


def test_a_plan_without_headroom_is_not_taken_for_others_growth(ground: Ground) -> None:
    (ledger,) = ground.plan.gpus
    full = msgspec.structs.replace(ledger, headroom=0, margin=0)
    plan = msgspec.structs.replace(ground.plan, gpus=(full,))
    monitor = GpuMonitor(plan, lambda: [ground.engine], ground.warn)
    monitor.look()
    assert not monitor.without_headroom([full.uuid])


def test_other_models_may_have_what_a_budget_withholds(ground: Ground) -> None:
    (ledger,) = ground.plan.gpus
    part = msgspec.structs.replace(ledger, headroom=3 * GIB, margin=3 * GIB)
    plan = msgspec.structs.replace(ground.plan, gpus=(part,))
    (card,) = ground.scenario.gpus
    card.used = ENGINE + 2 * GIB
    ground.change()
    GpuMonitor(plan, lambda: [ground.engine], ground.warn, fitted=True).look()
    assert ground.warned == []
    GpuMonitor(plan, lambda: [ground.engine], ground.warn).look()
    assert len(ground.warned) == 1


def test_what_is_left_of_others_when_ours_is_back() -> None:
    plan = plausible_plan(gpus=1, tp=1)
    (ledger,) = plan.gpus
    held = ledger.steady - ledger.used
    assert without(plan, {ledger.index: held + 5 * GIB}) == {ledger.index: 5 * GIB}
    assert without(plan, {ledger.index: held - GIB}) == {ledger.index: 0}
    assert without(plan, {}) == {}


def test_whether_a_card_of_an_engine_is_lost(ground: Ground) -> None:
    uuid = ground.scenario.gpus[0].uuid
    assert not any_lost(["GPU-of-another-machine", uuid])
    ground.scenario.gpus[0].error = LOST
    ground.change()
    assert any_lost(["GPU-of-another-machine", uuid])
    assert not any_lost(["GPU-of-another-machine"])


def test_a_lost_card_is_said(gpu_monitor: GpuMonitor, ground: Ground) -> None:
    """By its thread, which looks on its own."""
    gpu_monitor.start()
    ground.scenario.gpus[0].error = LOST
    ground.change()
    text = ground.wait()
    assert ground.warned[-1][0] in ("lost", "machine")
    assert "any more" in text
    gpu_monitor.stop()
    gpu_monitor.join()


def test_memory_that_comes_back_and_that_does_not(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []
    monkeypatch.setattr(
        module, "time", SimpleNamespace(monotonic=lambda: sum(looks), sleep=looks.append)
    )
    before = used_now(ground.plan)
    assert before == {0: ENGINE}
    grow(ground, 300 * MIB)
    (late,) = memory_back(ground.plan, before, seconds=10.0)
    assert sum(looks) > 10
    assert late == "GPU 0 still has 300 MiB more in use than before the launch"

    def comes_back(seconds: float) -> None:
        looks.append(seconds)
        grow(ground, 0)

    monkeypatch.setattr(module.time, "sleep", comes_back)
    assert memory_back(ground.plan, before, seconds=10.0) == []


@pytest.fixture
def planner(nvml_library: Path, tmp_path: Path) -> Iterator[tuple[Any, Scenario, Any]]:
    scenario = Scenario(gpus=[gpu_3090(0)])
    said: list[str] = []
    with in_process(nvml_library, scenario, tmp_path) as path, Leases(tmp_path / "l") as leases:

        def take(size: int) -> None:
            scenario.gpus[0].used += size
            scenario.gpus[0].compute.append(Process(os.getpid(), size, "python3"))
            scenario.write(path)

        yield (
            Planner(PlanRequest(model="internvl2-1b"), leases, said.append, rehearse=False),
            said,
            take,
        )


def test_a_given_plan_is_refused_where_somebody_took_memory(planner: Any) -> None:
    one, said, take = planner
    plan = one.make({})
    one.take(plan)
    assert said == []
    take(3 * GIB)
    with pytest.raises(DoesNotFitError, match=r"took 3\.0 GiB on GPU 0"):
        one.take(plan)


def test_a_driver_that_hangs_keeps_no_supervisor(ground: Ground, monkeypatch) -> None:
    """Its thread asks at each end of an engine, and at its own end."""
    monkeypatch.setattr(nvml, "_SECONDS", 0.01)
    answers, hung = threading.Event(), threading.Event()

    class HungNvml:
        def __enter__(self):
            hung.set()
            answers.wait(HANG)
            raise OSError

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("turbofit.machine.nvml.Nvml", HungNvml)
    assert not any_lost([ground.plan.gpus[0].uuid])
    assert hung.is_set()
    assert used_now(ground.plan) == {}
    assert memory_back(ground.plan, {0: 0}) == []
    answers.set()
    for thread in nvml._hung:
        thread.join(HANG)
