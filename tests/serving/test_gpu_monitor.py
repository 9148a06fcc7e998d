"""Others who grow into the margin, and memory that must come back; on a stand-in NVML."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from tests.support.nvml import LOST, Process, Scenario, gpu_3090, in_process
from tests.support.plans import changed, plausible_plan
from tests.support.waiting import HANG
from turbofit.core.plan import Plan
from turbofit.core.units import GIB, MIB
from turbofit.machine import nvml
from turbofit.serving import gpu_monitor as module
from turbofit.serving.gpu_monitor import (
    GpuMonitor,
    any_lost,
    beyond_forecast,
    memory_back,
    used_now,
)

ENGINE = 20 * GIB


class Ground:
    """A machine whose scenario may change, and a plan for it."""

    def __init__(self, scenario: Scenario, path: Path, plan: Plan, engine: int) -> None:
        self.scenario, self.path, self.plan, self.engine = scenario, path, plan, engine
        (self.card,), (self.ledger,) = scenario.gpus, plan.ledgers
        self.warned: list[tuple[str, str]] = []
        self.heard = threading.Event()

    def change(self) -> None:
        self.scenario.write(self.path)

    def warn(self, kind: str, text: str) -> None:
        self.warned.append((kind, text))
        self.heard.set()

    def monitor(self, *, every: float = 0.02, **ledger: int) -> GpuMonitor:
        """One that looks when it is told to, at a plan with another ledger."""
        gpus = (msgspec.structs.replace(self.ledger, **ledger),)
        plan = changed(self.plan, ledgers=gpus)
        return GpuMonitor(plan, lambda: [self.engine], self.warn, every=every)

    def grow(self, size: int) -> None:
        """Let somebody else have so much."""
        self.card.compute[1:] = [Process(os.getpid(), size, "python3")] if size else []
        self.card.used = ENGINE + size
        self.change()


@pytest.fixture
def ground(nvml_library: Path, tmp_path: Path) -> Iterator[Ground]:
    engine = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    card = gpu_3090(0)
    card.used = ENGINE
    card.compute.append(Process(engine.pid, ENGINE, "python"))
    scenario = Scenario(gpus=[card])
    plan = plausible_plan(gpus=1, tp=1)
    ledger = msgspec.structs.replace(
        plan.ledgers[0], uuid=card.uuid, used=0, headroom=400 * MIB, margin=256 * MIB
    )
    plan = changed(plan, ledgers=(ledger,))
    with in_process(nvml_library, scenario, tmp_path) as path:
        yield Ground(scenario, path, plan, engine.pid)
    engine.kill()
    engine.communicate()


def test_each_step_into_the_margin_is_said_once(ground: Ground) -> None:
    monitor, card = ground.monitor(), ground.card

    def said(size: int) -> list[str]:
        ground.grow(size)
        before = len(ground.warned)
        monitor.look()
        monitor.look()
        return [text for _, text in ground.warned[before:]]

    assert said(100 * MIB) == []
    card.compute[0].size += 2 * GIB  # what our own engine grows by is ours
    card.used += 2 * GIB
    ground.change()
    monitor.look()
    assert ground.warned == []
    card.compute[0].size -= 2 * GIB
    (text,) = said(200 * MIB)
    assert f"[{os.getpid()}] took 200 MiB on GPU 0" in text
    assert "200 MiB of the margin are left" in text
    (text,) = said(500 * MIB)
    assert "a worst-case request can now kill the engine" in text
    assert said(0) == []
    assert len(said(200 * MIB)) == 1


def test_whether_others_have_all_that_was_left_outlives_the_engine(ground: Ground) -> None:
    monitor, card = ground.monitor(), ground.card
    for size, taken in ((200 * MIB, False), (500 * MIB, True)):
        ground.grow(size)
        monitor.look()
        assert monitor.without_headroom(["GPU-of-another-engine", card.uuid]) is taken
    # The engine ends of it: NVML shows no more what was whose.
    card.compute, card.used = card.compute[1:], 500 * MIB
    ground.change()
    monitor.look()
    assert monitor.without_headroom([card.uuid])
    assert not monitor.without_headroom(["GPU-of-another-engine"])


def test_what_a_plan_leaves_nobody_or_other_models_may_have(ground: Ground) -> None:
    full = ground.monitor(headroom=0, margin=0)
    full.look()
    assert not full.without_headroom([ground.card.uuid])
    ground.card.used = ENGINE + 2 * GIB
    ground.change()
    for withheld, warnings in ((2 * GIB, 0), (0, 1)):  # by a budget
        ground.monitor(headroom=3 * GIB, margin=3 * GIB, withheld=withheld).look()
        assert len(ground.warned) == warnings


def test_what_engines_hold_beyond_the_forecast(ground: Ground) -> None:
    """What others took or freed is no part of it; it is unknown where NVML shows none of ours."""
    ours = ENGINE - (ground.ledger.peak - ground.ledger.used)
    for size in (0, 3 * GIB):
        ground.grow(size)
        assert beyond_forecast(ground.plan, [ground.engine]) == ours
    assert beyond_forecast(ground.plan, [os.getpid() + 1]) is None


def test_a_lost_card_is_said(ground: Ground) -> None:
    others = ["GPU-of-another-machine"]
    assert not any_lost([*others, ground.card.uuid])
    monitor = ground.monitor()
    monitor.start()
    ground.card.error = LOST
    ground.change()
    assert ground.heard.wait(HANG)
    kind, text = ground.warned[-1]
    assert kind in ("lost", "machine")
    assert "does not answer NVML" in text or "cannot be read" in text
    monitor.stop()
    monitor.join()
    assert any_lost([*others, ground.card.uuid])
    assert not any_lost(others)


def test_memory_that_comes_back_and_that_does_not(ground: Ground, monkeypatch) -> None:
    looks: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(looks), sleep=looks.append)
    monkeypatch.setattr(module, "time", clock)
    before = used_now(ground.plan)
    assert before == {0: ENGINE}
    ground.grow(300 * MIB)
    (late,) = memory_back(ground.plan, before, seconds=10.0)
    assert sum(looks) > 10
    assert late == "GPU 0 still has 300 MiB more in use than before the launch"

    def comes_back(seconds: float) -> None:
        looks.append(seconds)
        ground.grow(0)

    clock.sleep = comes_back
    assert memory_back(ground.plan, before, seconds=10.0) == []


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
    assert not any_lost([ground.plan.ledgers[0].uuid])
    assert hung.is_set()
    assert used_now(ground.plan) == {}
    assert memory_back(ground.plan, {0: 0}) == []
    answers.set()
    wait(nvml._hung, HANG)
