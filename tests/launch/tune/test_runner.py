from __future__ import annotations

import threading
from typing import Any

import pytest

from tests.load.scripted import ScriptedServer
from tests.waiting import HANG
from turbofit.launch.serve.supervisor import StopSignal
from turbofit.launch.tune import runner
from turbofit.launch.tune.load_child import LoadChild
from turbofit.launch.tune.runner import _Drive
from turbofit.load.spec import LoadSpec

FEW = LoadSpec.of(images=0, requests=2, concurrency=2, warm_up=0)


class Stop(StopSignal):
    """A stop whose end can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()

    def end(self, *number: Any) -> None:
        super().end(*number)
        self.ended.set()


def driven(*, key: str) -> _Drive:
    """Two loads with the key ``k``, driven to their end at a server of this key."""
    stop = Stop()
    with ScriptedServer(key=key) as server:
        drive = _Drive([FEW, FEW], "k", stop)
        drive.begin([server.url])
        assert stop.ended.wait(HANG)
        drive.end()
    return drive


def test_loads_follow_one_another_and_then_the_trial_ends() -> None:
    drive = driven(key="k")
    assert [one.answered for one in drive.results] == [2, 2]


def test_after_a_load_that_nothing_answers_none_follows() -> None:
    drive = driven(key="other")
    assert drive.results == []
    assert "does not know the key" in drive.why


def test_a_load_that_cannot_be_started_ends_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> LoadChild:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(runner, "LoadChild", full)
    stop = Stop()
    drive = _Drive([FEW], "k", stop)
    drive.begin(["http://x"])
    assert stop.ended.wait(HANG)
    drive.end()
    assert "no load could be started" in drive.why


def test_no_load_begins_after_an_engine_died() -> None:
    stop = Stop()
    with ScriptedServer(key="k") as server:
        drive = _Drive([FEW], "k", stop)
        drive.died("engine: out of memory")
        drive.begin([server.url])
        drive.end()
        assert server.bodies == []
    assert stop.ended.is_set()
    assert drive.death == "engine: out of memory"


def test_an_end_while_a_load_is_being_started_ends_that_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The load is started under the lock: who ends the drive finds it, or it never begins."""
    starting, go = threading.Event(), threading.Event()
    began: list[LoadChild] = []

    def slow(*given: Any) -> LoadChild:
        starting.set()
        assert go.wait(HANG)
        began.append(LoadChild(*given))
        return began[0]

    monkeypatch.setattr(runner, "LoadChild", slow)
    stop = Stop()
    with ScriptedServer("stall", "stall", key="k") as server:
        drive = _Drive([FEW, FEW], "k", stop)
        drive.begin([server.url])
        assert starting.wait(HANG)
        ends = threading.Thread(target=drive.end)
        ends.start()
        go.set()
        ends.join(HANG)
        assert not ends.is_alive()
    assert stop.ended.is_set()
    assert len(began) == 1
