"""One engine over days: what it has survived does not tell why it ends."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.plans import plausible_plan
from turbofit.core.plan import Command
from turbofit.serving.engine import supervised_engine
from turbofit.serving.engine.launches import Launch
from turbofit.serving.engine.supervised_engine import SupervisedEngine, Supervision

#: Torch's, of a request; the server before the engine lives on.
NO_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


class Process:
    """An engine's process, as far as it is looked at."""

    pid, log_error = 7, ""
    code: int | None = None

    def __init__(self, *_: Any, log_required: bool) -> None:
        self.log_required, self.said = log_required, list[tuple[str, int]]()

    def poll(self) -> int | None:
        return self.code

    def kill(self, seconds: float) -> bool:
        return self.code is not None

    def take(self, seconds: float = 0.0) -> list[tuple[str, int]]:
        said, self.said = self.said, []
        return said

    finish = take


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the kernel counts."""
    count = SimpleNamespace(so_far=3)
    monkeypatch.setattr(supervised_engine, "host_kills", lambda: count.so_far)
    return count


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SupervisedEngine:
    """One that serves since a time of 0 s."""

    class Probe:
        error, worst_cases, lived, unanswered = None, None, float("-inf"), False
        owes, asked_at, last_byte_at = False, 0.0, 0.0

        def __init__(self, *_: Any, **__: Any) -> None:
            self.ready = self.healthy = threading.Event()
            self.ready.set()

        def start(self) -> None:
            pass

        stop = start

    monkeypatch.setattr(supervised_engine, "EngineProcess", Process)
    monkeypatch.setattr(supervised_engine, "Probe", Probe)
    command = Command(argv=("lmdeploy", "--server-port", "1"), env={})
    made = SupervisedEngine(
        plausible_plan(gpus=1, tp=1), Launch(command, ("true",)), tmp_path, lambda _: None,
        Supervision(lambda _: None, clock=lambda: 0.0),
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
    engine.schedule_restart(0.0)
    engine.start()
    again: Any = engine.process
    assert (process.log_required, again.log_required) == (True, False)  # a first start needs it


def test_a_start_that_listens_and_does_not_answer_is_ended(engine, monkeypatch) -> None:
    """It hangs before it is ready; one that does not listen yet has `Timing.start`."""
    monkeypatch.setattr(supervised_engine, "processor_seconds", lambda _: 0.0)
    monkeypatch.setattr(supervised_engine, "any_busy", lambda _: False)
    engine.state, engine._probe.asked_at = "starting", 10.0
    engine._probe.ready.clear()
    assert engine.look(900.0) is None
    engine._probe.owes = True
    looks = [engine.look(10.0 + after) for after in range(0, 50, 5)]
    assert looks[:9] == [None] * 9
    assert "the engine hangs" in looks[9].message


def test_a_lost_loop_is_waited_for_and_asked_for(engine, monkeypatch) -> None:
    engine.tracker._loop_failed = 1.0
    assert engine.look(1.0) is None
    with monkeypatch.context() as patch:
        patch.setattr(engine.client, "completes", lambda _seconds: True)
        assert engine.look(9.0) is None  # an engine that answers has not lost it
        assert not engine.tracker.failing
    engine.tracker._loop_failed = 1.0
    ended = engine.look(1.0, last=True)  # the last look waits for no words
    assert ended is not None
    assert ended.kind == "crash"


def killed(engine: SupervisedEngine, *looks: float) -> str:
    """What turbofit takes its end by SIGKILL for, a second after these looks at the living one."""
    for now in looks:
        assert engine.look(now) is None
    process: Any = engine.process
    process.code = -9
    ended = engine.look(looks[-1] + 1.0)
    assert ended is not None
    return ended.kind


@pytest.mark.parametrize(
    ("looks", "kind"), [(range(10, 100, 10), "killed"), ((29, 31, 59), "host_memory")]
)
def test_a_kill_for_memory_may_take_seconds_and_no_minute(looks, kind, kills, engine) -> None:
    kills.so_far += 1
    assert killed(engine, *looks) == kind


@pytest.mark.parametrize(("answered", "kind"), [(51.0, "killed"), (49.0, "unknown")])
def test_an_error_that_it_survived_is_not_its_end(answered, kind, kills, engine) -> None:
    engine.process.said = [(NO_MEMORY, 1)]
    assert engine.look(50.0) is None
    engine._probe.lived = answered
    assert killed(engine, 55.0) == kind
    assert kills.so_far == 3
