"""The runner of a tuning: its load, its SLO, and the order of its trials."""

from __future__ import annotations

import signal
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec.structs import replace

from tests.measure.load.scripted import ScriptedServer
from tests.support.waiting import HANG, until
from turbofit.core.errors import LaunchError, UsageError
from turbofit.core.process.signals import StoppedError, StopSignal
from turbofit.core.tuning import SpeedFigures, TrialForecast
from turbofit.measure import tune_runner as runner
from turbofit.measure.load.spec import LoadSpec
from turbofit.measure.tune_runner import TrialEnd, _Load, order, run_trial
from turbofit.measure.tune_space import LoadForecast, TrialChoice
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


SEEN = SpeedFigures(
    requests_per_second=1.0, output_tokens_per_second=10.0, ttft_p50=0.1, ttft_p90=0.5,
    tpot_p50=0.01, tpot_p90=0.02, e2e_p50=1.0, e2e_p90=2.0, answered=200, failed=0,
)  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=", "ttft=0s", "itl=2s", "ttft=1s,ttft=2s", "ttft=-1s", "e2e=1d"]
)
def test_what_is_no_limit_is_said(text) -> None:
    assert runner.parse_slo("ttft=2s, tpot=50ms") == {"ttft": 2.0, "tpot": 0.05}
    with pytest.raises(UsageError) as caught:
        runner.parse_slo(text)
    assert caught.value.message.startswith("--slo")


def test_nine_of_ten_must_keep_it_and_nearly_all_be_answered() -> None:
    assert runner.meets(SEEN, {})
    assert runner.meets(SEEN, {"ttft": 0.5, "tpot": 0.02, "e2e": 2.0})
    assert not runner.meets(SEEN, {"ttft": 0.49})
    assert runner.meets(replace(SEEN, failed=2), {})
    assert not runner.meets(replace(SEEN, failed=3), {})
    assert not runner.meets(replace(SEEN, answered=0), {})


def choice(rate: float, ttft: float = 0.1, tpot: float = 0.01) -> TrialChoice:
    told = TrialForecast(requests_per_second=rate, ttft=None, tpot=tpot)
    forecast = LoadForecast(requests_per_second=rate, ttft=ttft, tpot=tpot, told=told)
    return TrialChoice({"max_batch_size": rate}, PLAN, forecast)


def measured(rate: float, ttft_p90: float) -> tuple[LoadForecast, SpeedFigures]:
    """Settings with a forecast of 4 requests a second and 0.1 s to the first token."""
    return choice(4).forecast, replace(SEEN, requests_per_second=rate, ttft_p90=ttft_p90)


def rates(
    *given: TrialChoice,
    measured: tuple[LoadForecast, SpeedFigures] | None = None,
    **slo: float,
) -> list[float]:
    return [one.rate for one in order(given, measured, slo, at_once=8)]


def test_the_highest_forecast_that_keeps_the_slo_comes_first() -> None:
    few, some, many = choice(2, ttft=0.1), choice(4, ttft=0.2), choice(8, ttft=0.4)
    assert (rates(few, some, many), rates(few, some, many, ttft=0.2)) == ([8, 4, 2], [4, 2, 8])
    # Where none keeps it, the one that misses it least.
    assert rates(few, some, many, ttft=0.01) == [2, 4, 8]
    # Times were twice the forecast, so that they are for the others, too.
    assert rates(few, some, many, measured=measured(1.0, 0.2), ttft=0.2) == [2, 4, 8]
    assert rates(few, some, many, measured=measured(1.0, 0.05), ttft=0.2) == [8, 4, 2]
    # An answer of 8 requests at once takes 8 s at one a second.
    assert rates(few, some, many, e2e=3.0) == [8, 4, 2]
