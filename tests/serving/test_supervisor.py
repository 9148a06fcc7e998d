"""A supervisor that leaves its engines alone: the gateway answers, and they are started again."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.plans import plausible_plan
from tests.support.processes import REPO, STANDIN
from tests.support.serving import ask_at
from tests.support.waiting import HANG
from turbofit.core.engine_end import End
from turbofit.core.errors import UsageError
from turbofit.core.process.signals import StopSignal
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.routing.engines import Outage
from turbofit.gateway.server import GatewayThread
from turbofit.planning.commands import commands
from turbofit.serving.engine.engine_client import Timing
from turbofit.serving.engine.engine_log import EndedError
from turbofit.serving.engine.launches import Launch
from turbofit.serving.engine.supervised_engine import Supervision
from turbofit.serving.plan_gateway import make_gateway
from turbofit.serving.supervisor import Supervisor


@pytest.fixture(autouse=True)
def standin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines find what they stand in for."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(REPO), str(STANDIN))))


class Supervised:
    """A server on stand-in engines; the test acts at each look, and moves the clock."""

    def __init__(self, tmp_path: Path, port: int, *, gpus: int = 1, restarts: int = 1) -> None:
        # Whole seconds: (now + 600) - now is then 600, and no end counts at the edge of the window.
        self.now = float(round(time.monotonic()))
        self.rests: list[Outage | None] = []
        self.said: list[str] = []
        self.plan = plausible_plan(gpus=gpus, tp=1)
        runner = (sys.executable, str(STANDIN / "fake_server.py"))
        launches = [
            Launch(command, runner, group=group)
            for group, command in enumerate(commands(self.plan, port=port))
        ]
        supervision = Supervision(
            self.said.append, timing=Timing(liveness=0.0, tick=0.01, restarts=restarts),
            on_rest=self._rest, clock=lambda: self.now,
        )  # fmt: skip
        self.server = Supervisor(self.plan, launches, tmp_path, supervision)
        self.stop = StopSignal()
        self.front: GatewayThread | None = None
        self.ends: list[tuple[int, End]] = []

    def supervision(self, **changes: Any) -> None:
        """Change what the supervisor and its engines were given."""
        changed = dataclasses.replace(
            self.server._supervision,
            on_end=lambda engine, end: self.ends.append((engine.group, end)), **changes,
        )  # fmt: skip
        for one in (self.server, *self.server.engines):
            one._supervision = changed

    def run(self, look) -> None:
        """Until ``look`` has returned True, or nothing can happen that it waits for."""
        until, still = time.monotonic() + HANG, 0

        def on_tick() -> None:
            nonlocal still
            assert time.monotonic() < until, "\n".join(self.said)
            before = self.now
            if look():
                self.stop.end()
            # Engines that rest stay so until the clock moves, and only the test moves it.
            rest = all(engine.state == "broken" for engine in self.server.engines)
            still = still + 1 if rest and self.now == before else 0
            assert still < 100, "\n".join(self.said)
            assert all(engine.starts < 10 for engine in self.server.engines), "\n".join(self.said)

        try:
            assert self.server.run(self.stop, self._open, on_tick) is signal.SIGTERM
        finally:
            if self.front is not None:
                self.front.stop(drain=False)

    def ended_again(self, *engines: Any) -> bool:
        """Kill each engine that is ready and start it again at once; whether all are left alone."""
        engines = engines or tuple(self.server.engines)
        for engine in engines:
            if engine.state == "ready":
                os.kill(engine.process.pid, signal.SIGSEGV)
                engine.process.wait(HANG)
            elif engine.state == "waiting":
                self.now = max(self.now, engine.again_at)
        return all(engine.state == "broken" for engine in engines)

    def _open(self, urls: list[str]) -> None:
        config = GatewayConfig(port=0, retry_seconds=0.01)
        self.front = GatewayThread(make_gateway(self.plan, urls, config))
        self.front.start()
        self.ask = partial(ask_at, self.front.url)

    def _rest(self, outage: Outage | None) -> None:
        self.rests.append(outage)
        assert self.front is not None
        self.front.call(lambda gateway: gateway.rest(outage), HANG)


@pytest.fixture
def one(tmp_path: Path, port: int) -> Supervised:
    return Supervised(tmp_path, port)


def test_the_gateway_answers_while_its_engine_rests_and_then_it_serves_again(
    tmp_path: Path, port: int
) -> None:
    one = Supervised(tmp_path, port, restarts=2)
    told: list[Any] = []
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}

    def look() -> bool:
        if not told:
            if one.rests:
                began = one.now
                for waited in (0.0, 170.5, 599.0):
                    one.now = began + waited
                    told.append((one.ask("/v1/chat/completions", chat), one.ask("/health")))
                one.now = began + 600.0
            else:
                one.ended_again()
            return False
        (engine,) = one.server.engines
        return engine.state == "ready" and one.ask("/v1/chat/completions", chat)[0] == 200

    one.run(look)
    for (asked, health), seconds in zip(told, ("600", "430", "1"), strict=True):
        assert asked[0] == health[0] == 503
        assert asked[1]["retry-after"] == health[1]["retry-after"] == seconds
    message = "the inference engine ended 3 times within 10 minutes and rests; the next start is in"
    asked, health = told[0]
    assert asked[2]["error"]["message"] == health[2]["message"] == f"{message} 600 s"
    assert (health[2]["status"], one.rests[1:]) == ("resting", [None])
    assert one.server.engines[0].starts == 4
    assert any("in 10 minutes; no engine serves" in line for line in one.said)


def test_while_one_engine_serves_nothing_rests(tmp_path: Path, port: int) -> None:
    one = Supervised(tmp_path, port, gpus=2)

    def look() -> bool:
        first, second = one.server.engines
        if one.front is None or not one.ended_again(second) or first.state != "ready":
            return False
        return not one.server.starting  # what stands by is replaced meanwhile

    one.run(look)
    assert one.rests == []
    assert any("in 10 minutes; the other engines serve" in line for line in one.said)


def test_an_engine_that_cannot_be_started_now_is_tried_again_while_the_others_serve(
    tmp_path: Path, port: int
) -> None:
    """Its checkpoint is on a mount that is away for a while, or the overlay cannot be made."""
    one = Supervised(tmp_path, port, gpus=2, restarts=5)
    first, second = one.server.engines
    errors: list[Exception] = []

    def before_start() -> None:
        if one.front is not None and len(errors) < 3:
            gone = UsageError("the checkpoint is not on this machine", hint="download it first")
            errors.append(gone if len(errors) < 2 else OSError(116, "Stale file handle"))
            raise errors[-1]

    one.supervision(before_start=before_start)

    def look() -> bool:
        if one.front is None:  # both serve then
            return False
        if len(errors) < 3:
            one.ended_again(second)
        else:
            one.now = max(one.now, second.again_at)
        return first.state == second.state == "ready" and len(errors) == 3

    one.run(look)
    assert (first.starts, second.starts) == (1, 2)
    told = "\n".join(one.said)
    assert told.count("engine 1: the checkpoint is not on this machine") == 2
    assert "engine 1: [Errno 116] Stale file handle" in told
    pauses = [line.partition("starting again in ")[2] for line in one.said if "again in" in line]
    assert pauses == ["1.0 s", "2.0 s", "4.0 s", "8.0 s"]
    assert [group for group, _ in one.ends] == [1, 1, 1, 1]


def test_an_engine_that_never_served_and_cannot_be_started_ends_the_server(
    one: Supervised,
) -> None:
    def before_start() -> None:
        raise UsageError("the checkpoint is not on this machine", hint="download it first")

    one.supervision(before_start=before_start)
    with pytest.raises(UsageError):
        one.run(lambda: False)


def test_what_never_served_does_not_rest(one: Supervised) -> None:
    """Nobody listens yet who could tell clients of it."""
    (engine,) = one.server.engines
    engine.was_ready = True  # so that each end counts as passing
    engine.launch.runner = (sys.executable, str(STANDIN / "no_such_file.py"))
    with pytest.raises(EndedError):
        one.run(lambda: one.ended_again() and False)
    assert one.rests == []


# Engines that end at the same moment.


class Ending:
    """An engine that serves, and ends as it is told."""

    def __init__(self, group: int, first: Any, last: Any = None) -> None:
        self.group, self.name = group, f"engine {group}"
        self.process: Any = SimpleNamespace(pid=group, kill_group=lambda: None)
        self.was_ready, self.state, self.looks = True, "ready", [first, last]
        self.url = f"http://127.0.0.1:{group}"

    def start(self, *_: Any) -> bool:
        return True

    stop_probe = end = start

    def look(self, now: float, *, last: bool = False) -> End | None:
        return self.looks[last]


def ended(kind: Any) -> End:
    return End(kind=kind, message=kind, hint="none")


def supervised(tmp_path: Path, *engines: Ending) -> tuple[Supervisor, list[int], list[str]]:
    """A server of these engines, the groups that it tells the end of, and what it says."""
    told: list[int] = []
    said: list[str] = []
    supervision = Supervision(said.append, on_end=lambda engine, _: told.append(engine.group))
    server = Supervisor(plausible_plan(gpus=1), (), tmp_path, supervision)
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
    stop = StopSignal()

    class Struck(Ending):
        def look(self, now: float, *, last: bool = False) -> End | None:
            stop.end_now()
            return super().look(now, last=last)

    struck = Struck(0, ended("killed"))
    struck.process = None
    server, told, said = supervised(tmp_path, struck)
    assert server.run(stop, lambda _: None) is signal.SIGTERM
    assert (told, said) == ([], ["stopping: SIGTERM"])
