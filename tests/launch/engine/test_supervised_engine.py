"""One engine over days: what it has survived does not tell why it ends."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.plans import plausible_plan
from turbofit.core.plan import Command
from turbofit.launch.engine import kernel, supervised_engine
from turbofit.launch.engine.engine_client import Timing
from turbofit.launch.engine.launches import Launch
from turbofit.launch.engine.supervised_engine import SupervisedEngine

#: Torch's, of a request; the server before the engine lives on.
NO_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


class Process:
    """An engine's process, as far as it is looked at."""

    pid = 7
    log_error = ""

    def __init__(self, *_: Any, log_required: bool) -> None:
        self.log_required = log_required
        self.code: int | None = None
        self.said: list[tuple[str, int]] = []

    def poll(self) -> int | None:
        return self.code

    def kill(self, seconds: float) -> bool:
        return self.code is not None

    def take(self) -> list[tuple[str, int]]:
        said, self.said = self.said, []
        return said

    def finish(self, seconds: float = 2.0) -> list[tuple[str, int]]:
        return self.take()


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the kernel counts."""
    count = SimpleNamespace(so_far=3)
    monkeypatch.setattr(kernel, "host_kills", lambda: count.so_far)
    return count


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SupervisedEngine:
    """One that serves since a time of 0 s."""

    class Probe:
        error, checks, lived, unanswered = None, False, float("-inf"), False

        def __init__(self, *_: Any, **__: Any) -> None:
            self.ready = self.healthy = threading.Event()
            self.ready.set()

        def start(self) -> None:
            pass

        stop = start

    monkeypatch.setattr(supervised_engine, "EngineProcess", Process)
    monkeypatch.setattr(supervised_engine, "Probe", Probe)
    command = Command(argv=("lmdeploy", "--server-port", "1"), env={}, group=0)
    made = SupervisedEngine(
        plausible_plan(gpus=1, tp=1), Launch(command, ("true",)), tmp_path, lambda _: None,
        check=False, timing=Timing(), name="engine", clock=lambda: 0.0,
    )  # fmt: skip
    made.start()
    assert made.look(0.0) is None
    assert made.state == "ready"
    return made


def test_a_process_that_outlives_its_kill_is_not_forgotten(engine: SupervisedEngine) -> None:
    process: Any = engine.process
    assert not engine.end(0.0)
    assert engine.process is process
    process.code = -9
    assert engine.end(0.0)
    assert engine.process is None
    assert engine.end(0.0)


def test_only_a_first_start_needs_its_log(engine: SupervisedEngine) -> None:
    process: Any = engine.process
    assert process.log_required
    engine.start()
    process = engine.process
    assert not process.log_required


def test_the_last_look_waits_for_no_words(engine: SupervisedEngine) -> None:
    engine.tracker._loop_failed = 1.0
    assert engine.look(1.0) is None
    ended = engine.look(1.0, last=True)
    assert ended is not None
    assert ended.kind == "crash"


def test_an_engine_that_answers_has_not_lost_its_loop(
    engine: SupervisedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.tracker._loop_failed = 1.0
    monkeypatch.setattr(engine.client, "completes", lambda _seconds: True)
    engine.state = "ready"
    assert engine.look(9.0) is None
    assert not engine.tracker.failing


def killed(engine: SupervisedEngine, now: float) -> str:
    """What turbofit takes its end for, by SIGKILL."""
    process: Any = engine.process
    process.code = -9
    ended = engine.look(now)
    assert ended is not None
    return ended.kind


def test_a_kill_for_memory_of_long_ago_was_another_process(
    kills: SimpleNamespace, engine: SupervisedEngine
) -> None:
    kills.so_far += 1
    for now in range(10, 100, 10):
        assert engine.look(now) is None
    assert killed(engine, 100.0) == "killed"


def test_a_kill_for_memory_may_take_seconds(
    kills: SimpleNamespace, engine: SupervisedEngine
) -> None:
    kills.so_far += 1
    for now in (29.0, 31.0, 59.0):
        assert engine.look(now) is None
    assert killed(engine, 60.0) == "host_memory"


@pytest.mark.parametrize(("answered", "kind"), [(51.0, "killed"), (49.0, "unknown")])
def test_an_error_that_it_survived_is_not_its_end(
    kills: SimpleNamespace, engine: SupervisedEngine, answered: float, kind: str
) -> None:
    process: Any = engine.process
    probe: Any = engine._probe
    process.said = [(NO_MEMORY, 1)]
    assert engine.look(50.0) is None
    probe.lived = answered
    assert engine.look(55.0) is None
    assert killed(engine, 60.0) == kind
    assert kills.so_far == 3
