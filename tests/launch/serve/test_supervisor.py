"""Engines that end at the same moment, as `Supervisor` tells of them."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.core.process.test_signals import signalled_in_a_finalizer
from tests.support.plans import plausible_plan
from turbofit.core.rehearsal import End
from turbofit.launch.engine.engine_log import EndedError
from turbofit.launch.serve.supervisor import StoppedError, StopSignal, Supervisor


class Ending:
    """An engine that serves, and ends as it is told."""

    def __init__(self, group: int, first: Any, last: Any = None) -> None:
        self.group, self.name = group, f"engine {group}"
        self.process: Any = SimpleNamespace(pid=group, strike=lambda: None)
        self.was_ready, self.state, self.looks = True, "ready", [first, last]
        self.url = f"http://127.0.0.1:{group}"

    def start(self) -> None:
        pass

    quiet = start

    def look(self, now: float, *, last: bool = False) -> End | None:
        return self.looks[last]

    def end(self, seconds: float) -> bool:
        self.process = None
        return True


def ended(kind: Any) -> End:
    return End(kind=kind, message=kind, hint="none")


def supervised(tmp_path: Path, *engines: Ending) -> tuple[Supervisor, list[int], list[str]]:
    """A server of these engines, the groups that it tells the end of, and what it says."""
    told: list[int] = []
    said: list[str] = []
    server = Supervisor(
        plausible_plan(gpus=1), (), tmp_path, said.append,
        on_end=lambda engine, _: told.append(engine.group),
    )  # fmt: skip
    server.engines = [*engines]  # type: ignore[list-item]
    return server, told, said


def test_who_ended_as_another_is_given_up_is_told_of_too(tmp_path: Path) -> None:
    """What it ended of would else be learned from one engine more."""
    server, told, _ = supervised(
        tmp_path,
        Ending(0, None, ended("crash")),  # its loop has ended, and its last words may yet come
        Ending(1, ended("host_memory")),
        Ending(2, None),
        Ending(3, None, ended("out_of_memory")),
    )
    with pytest.raises(EndedError):
        server.run(StopSignal(), lambda _: None)
    assert told == [1, 0, 3]


def test_an_engine_that_a_second_signal_killed_is_not_started_again(tmp_path: Path) -> None:
    """Of several models each is followed in a thread, which the signal finds anywhere."""
    stop = StopSignal()

    class Struck(Ending):
        def look(self, now: float, *, last: bool = False) -> End | None:
            stop.strike()
            return super().look(now, last=last)

    struck = Struck(0, ended("killed"))
    struck.process = None
    server, told, said = supervised(tmp_path, struck)
    assert server.run(stop, lambda _: None) is signal.SIGTERM
    assert (told, said) == ([], ["stopping: SIGTERM"])


def test_a_signal_inside_a_finalizer_ends_what_runs_nothing_yet() -> None:
    with pytest.raises(StoppedError) as stopped, StopSignal() as stop:
        signalled_in_a_finalizer(signal.SIGTERM)
    assert stopped.value.signal is signal.SIGTERM
    assert not stop.urgent, "one signal, not two"
