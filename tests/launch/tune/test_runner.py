"""The runner of a tuning, and its load."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from tests.load.scripted import ScriptedServer
from tests.support.waiting import HANG, until
from turbofit.core.errors import LaunchError
from turbofit.launch.serve.config import ServeConfig
from turbofit.launch.serve.supervisor import StoppedError, StopSignal
from turbofit.launch.tune import runner
from turbofit.launch.tune.runner import TrialEnd, _Load, run_trial
from turbofit.load.spec import LoadSpec
from turbofit.observe.tuned import plain
from turbofit.planning.plan import plan
from turbofit.planning.request import PlanRequest

PLAN = plan(PlanRequest(model="internvl2-1b", on="1xrtx3090", engine="turbomind"))

FEW = LoadSpec.of(images=0, requests=2, concurrency=2, warm_up=0)


def driven(load: _Load, url: str) -> None:
    """Follow a load to the end of its trial."""
    load.begin([url])

    def over() -> bool:
        load.look()
        return load._stop.signal is not None

    until(over, "the trial ends")
    load.end()


def loaded(*answers: str, spec: LoadSpec = FEW, key: str = "k") -> _Load:
    load = _Load(spec, "k", StopSignal())
    with ScriptedServer(*answers, key=key) as server:
        driven(load, server.url)
    return load


def test_every_option_of_a_load_reaches_it() -> None:
    spec = LoadSpec.of(
        images=2, image_size=((64, 32), (8, 8)), prompt_spread=0.5, stop_early=True, rate=50.0,
        evenly=True, requests=2, warm_up=0, seed=7,
    )  # fmt: skip
    result = loaded(spec=spec).result
    assert result is not None
    assert (result.answered, result.stopped) == (2, "")
    assert plain(result.load) == plain(spec.given())


def test_why_it_measured_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    assert "does not know the key" in loaded(key="other").why
    assert "no request was answered" in loaded("500", "500").why
    monkeypatch.setattr(runner.subprocess, "Popen", full)
    assert "no load could be started" in loaded().why


def test_a_load_that_is_killed_says_how_it_ended() -> None:
    load = _Load(FEW, "k", StopSignal())
    with ScriptedServer("stall", "stall", key="k") as server:
        load.begin([server.url])
        load.look()
        assert server.stalled.wait(HANG)
        assert load._process is not None
        load._process.kill()
        driven(load, server.url)
    assert load.result is None
    assert load.why == "the load ended with -9"


def test_no_load_begins_after_an_engine_died() -> None:
    load = _Load(FEW, "k", StopSignal())
    with ScriptedServer(key="k") as server:
        load.died("engine: out of memory")
        driven(load, server.url)
        assert server.bodies == []
    assert load.death == "engine: out of memory"


def follow_of(*, opens: str = "", abrupt: bool = False, dies: bool = False) -> Any:
    """Stands for a run of engines: it opens, and follows its stop as a supervisor does."""

    def follow(real: Any, stop: StopSignal) -> Any:
        stop.abrupt = abrupt
        if opens:
            real.on_open([opens])
        deadline = time.monotonic() + HANG
        while stop.signal is None:
            assert time.monotonic() < deadline
            real.on_tick()
            time.sleep(0.01)
        if dies:
            raise LaunchError("its process was killed", hint="x")
        return stop.signal

    return follow


def tried(monkeypatch: Any, follow: Any, load: LoadSpec, seconds: float | None) -> TrialEnd:
    monkeypatch.setattr(runner.Run, "follow", follow)
    monkeypatch.setattr(runner.secrets, "token_hex", lambda _: "k")
    lmdeploy: Any = SimpleNamespace(version="0.18.0", warning=None)
    leases: Any = None
    model = runner.Run(ServeConfig(pretend=True), leases, lambda _: None, lmdeploy=lmdeploy)
    return run_trial(model, PLAN, load, seconds)


def test_a_trial_whose_engine_starts_too_slowly_is_ended_in_time(monkeypatch) -> None:
    before = signal.getsignal(signal.SIGALRM)
    for follow in (follow_of(), follow_of(abrupt=True), follow_of(dies=True)):
        end = tried(monkeypatch, follow, FEW, 0.05)
        assert (end.outcome, end.result) == ("cut", None)
        assert end.why == "the time was over before its engine was ready"
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_load_under_way_is_ended_with_what_it_measured(monkeypatch) -> None:
    def over() -> None:
        server.stalled.wait(HANG)
        os.kill(os.getpid(), signal.SIGALRM)

    load = LoadSpec.of(images=0, requests=9, concurrency=1, warm_up=0)
    with ScriptedServer("ok", "ok", "ok", "ok", "stall", key="k") as server:
        alarm = threading.Thread(target=over)
        alarm.start()
        end = tried(monkeypatch, follow_of(opens=server.url), load, HANG)
        alarm.join(HANG)
    assert (end.outcome, end.result and end.result.answered) == ("cut", 4)
    assert "were measured" in end.why


def test_a_load_that_ends_in_time_is_whole(monkeypatch) -> None:
    with ScriptedServer(key="k") as server:
        end = tried(monkeypatch, follow_of(opens=server.url), FEW, HANG)
    assert (end.outcome, end.why) == ("measured", "")
    assert end.result is not None
    assert end.result.answered == 2


def test_a_person_s_signal_is_none_of_the_time(monkeypatch) -> None:
    def interrupted(_: Any, stop: StopSignal) -> Any:
        stop.abrupt = False
        signal.raise_signal(signal.SIGINT)
        return stop.signal

    with pytest.raises(StoppedError) as stopped:
        tried(monkeypatch, interrupted, FEW, HANG)
    assert stopped.value.signal is signal.SIGINT
