"""The runner of a tuning, and its load."""

from __future__ import annotations

import signal
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.measure.load.scripted import ScriptedServer
from tests.support.waiting import HANG, until
from turbofit.core.errors import LaunchError
from turbofit.core.process.signals import StoppedError, StopSignal
from turbofit.measure import tune_runner as runner
from turbofit.measure.load.spec import LoadSpec
from turbofit.measure.tune_runner import TrialEnd, _Load, run_trial
from turbofit.planning.plan import plan
from turbofit.planning.request import PlanRequest
from turbofit.planning.tuned import plain
from turbofit.serving.options import ServeConfig

PLAN = plan(PlanRequest(model="internvl2-1b", on="1xrtx3090", engine="turbomind"))

FEW = LoadSpec.of(images=0, requests=2, concurrency=2, warm_up=0)


def iter_of(*loads: LoadSpec) -> Any:
    """The loads of a trial, whatever they come to."""
    for load in loads:  # noqa: UP028 - an iterator of a tuple takes nothing that is sent
        yield load


def test_the_next_load_begins_where_one_has_ended() -> None:
    ends: list[TrialEnd] = []

    def loads() -> Any:
        ends.append((yield FEW))
        ends.append((yield FEW.changed(requests=3)))

    load = _Load(loads(), "k", stop := StopSignal())
    with ScriptedServer(key="k") as server:
        driven(load, server.url, stop)
    assert [end.measured.answered for end in ends if end.measured] == [2, 3]


def driven(load: _Load, url: str, stop: StopSignal) -> None:
    load.begin([url])

    def over() -> bool:
        load.look()
        return stop.signal is not None

    until(over, "the trial ends")
    load.end()


def test_every_option_of_a_load_reaches_it() -> None:
    spec = LoadSpec.of(
        images=2, image_size=(64, 32), shared_prefix=9, stop_early=True, rate=50.0, requests=2,
        warm_up=0,
    )  # fmt: skip
    load = _Load(iter_of(spec), "k", stop := StopSignal())
    with ScriptedServer(key="k") as server:
        driven(load, server.url, stop)
    assert load.result is not None
    assert (load.result.answered, load.result.stopped) == (2, "")
    assert plain(load.result.load) == plain(spec.given())


@pytest.mark.parametrize(
    ("key", "answers", "why"),
    [("other", (), "does not know the key"), ("k", ("500", "500"), "no request was answered")],
)
def test_why_it_measured_nothing_is_known(key: str, answers: tuple[str, ...], why: str) -> None:
    load = _Load(iter_of(FEW), "k", stop := StopSignal())
    with ScriptedServer(*answers, key=key) as server:
        driven(load, server.url, stop)
    assert why in load.last.why


def test_a_load_that_is_killed_says_how_it_ended() -> None:
    load = _Load(iter_of(FEW), "k", stop := StopSignal())
    with ScriptedServer("stall", "stall", key="k") as server:
        load.begin([server.url])
        assert server.stalled.wait(HANG)
        assert load._process is not None
        load._process.kill()
        until(lambda: load.look() or stop.signal, "the trial ends")
        load.end()
    assert load.result is None
    assert load.last.why == "the load ended with -9"


def test_no_load_begins_after_an_engine_died() -> None:
    load = _Load(iter_of(FEW), "k", stop := StopSignal())
    with ScriptedServer(key="k") as server:
        load.died("engine: out of memory")
        driven(load, server.url, stop)
        assert server.bodies == []
    assert load.death == "engine: out of memory"


class Run:
    """Stands for a run of engines: it opens, and follows its stop as a supervisor does."""

    def __init__(self, opens: str = "", *, dies: bool = False) -> None:
        self.opens, self.dies = opens, dies

    def follow(self, real: Any, stop: StopSignal) -> Any:
        stop.abrupt = False
        if self.opens:
            real.on_open([self.opens])
        deadline = time.monotonic() + HANG
        while stop.signal is None:
            assert time.monotonic() < deadline
            real.on_tick()
            time.sleep(0.01)
        if self.dies:
            raise LaunchError("its process was killed", hint="x")
        return stop.signal


def tried(monkeypatch: pytest.MonkeyPatch, run: Run) -> TrialEnd:
    def follow(real: Any, stop: StopSignal) -> Any:
        return run.follow(real, stop)

    monkeypatch.setattr(runner, "follow", follow)
    monkeypatch.setattr(runner.secrets, "token_hex", lambda _: "k")
    config = ServeConfig(pretend=True)
    lmdeploy: Any = SimpleNamespace(version="0.18.0", warning=None)
    model = runner.Run(config, cast("Any", None), lambda _: None, lmdeploy=lmdeploy)
    return run_trial(model, PLAN, FEW)


def test_a_trial_has_what_its_load_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(key="k") as server:
        end = tried(monkeypatch, Run(server.url))
    assert (end.outcome, end.why) == ("measured", "")
    assert end.measured is not None
    assert end.measured.answered == 2


def test_a_trial_whose_engine_dies_says_of_what(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(key="k") as server:
        end = tried(monkeypatch, Run(server.url, dies=True))
    assert (end.outcome, end.why) == ("died", "its process was killed")


def test_a_person_s_signal_is_no_end_of_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Run):
        def follow(self, real: Any, stop: StopSignal) -> Any:
            stop.abrupt = False
            signal.raise_signal(signal.SIGINT)
            return stop.signal

    with pytest.raises(StoppedError) as stopped:
        tried(monkeypatch, Interrupted())
    assert stopped.value.signal is signal.SIGINT
