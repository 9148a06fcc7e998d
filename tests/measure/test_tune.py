"""The loop of a tuning, before a stand-in for the engines."""

from __future__ import annotations

import signal
from functools import cache
from typing import Any

import pytest

from tests.measure.test_tune_space import LOAD
from turbofit.core.errors import LaunchError
from turbofit.core.process.signals import StoppedError
from turbofit.core.tuning import Tuning
from turbofit.measure.load.result import LoadResult, Spread
from turbofit.measure.load.spec import LoadSpec
from turbofit.measure.tune import Tuner, why_not_kept
from turbofit.measure.tune_runner import TrialEnd, figures_of
from turbofit.measure.tune_space import choices, drafts_to_try
from turbofit.planning.plan import plan
from turbofit.planning.request import PlanRequest

REQUEST = PlanRequest(model="internvl2-2b", on="1xrtx3090", engine="turbomind")
FACTS: dict[str, Any] = {
    "model": "m", "gpus": ("c",), "driver": "1", "lmdeploy": "0.18.0", "promise": {}, "load": {},
}  # fmt: skip
STOP = StoppedError(signal.SIGINT)


@cache
def every_choice() -> list[Any]:
    return choices(REQUEST, plan(REQUEST), LOAD, 64, (0,))


def result(rate: float, ttft: float = 0.1) -> LoadResult:
    spread = Spread(count=9, mean=ttft, p50=ttft, p90=ttft, p99=ttft, most=ttft)
    return LoadResult(
        turbofit_version="0", created="", url="", model="m", load={}, seconds=30.0, begun=900,
        answered=900, requests_per_second=rate, output_tokens_per_second=rate,
        running=64.0, ttft=spread, tpot=spread, e2e=spread,
    )  # fmt: skip


class Engines:
    """Serve most with most rows and a prefill of 8192; ``ends`` replaces the n-th start's end.

    A start takes ``seconds`` of a clock that only it moves.
    """

    def __init__(self, ends: dict[int, Any] | None = None, seconds: float = 60.0) -> None:
        self.ends, self.seconds = ends or {}, seconds
        self.now = 0.0
        self.started: list[tuple[int, int]] = []
        self.loads: list[LoadSpec] = []

    def plan_of(self, options: dict[str, Any]) -> Any:
        return next(one.plan for one in every_choice() if one.options == options)

    def run(self, plan: Any, load: LoadSpec) -> TrialEnd:
        settings = plan.engines[0].settings
        self.loads.append(load)
        self.started.append((settings.max_batch_size, settings.max_prefill_token_num))
        end = self.ends.get(len(self.started))
        if isinstance(end, BaseException):
            raise end
        if end is not None:
            return end
        rate = settings.max_batch_size + 0.5 * (settings.max_prefill_token_num == 8192)
        self.now += self.seconds
        return TrialEnd(figures_of(result(rate)), "measured")


def go(engines: Engines, **given: Any) -> Tuning:
    given = {"slo": {}, "seconds": 1e6, "starts": 6, **given}
    load = given.pop("load", LoadSpec.of(concurrency=64, seconds=30.0))
    blank = Tuning(
        turbofit_version="0", created="", goal="throughput", slo=given.pop("slo"), **FACTS
    )
    return Tuner(
        every_choice(), load, engines.plan_of, engines.run, lambda _: None, at_once=64, blank=blank,
        clock=lambda: engines.now, **given,
    ).tune()  # fmt: skip


def test_the_plan_as_it_is_then_the_best_forecasts_then_the_best_again() -> None:
    engines = Engines()
    found = go(engines)
    usual, *rest = every_choice()
    settings = [one.plan.engines[0].settings for one in (usual, *rest[:5])]
    assert engines.started[:6] == [(s.max_batch_size, s.max_prefill_token_num) for s in settings]
    assert [trial.again for trial in found.trials] == [False] * 6 + [True]
    assert found.winner is not None
    best = (found.winner.max_batch_size, found.winner.max_prefill_token_num)
    assert engines.started[6] == best == max(engines.started, key=lambda s: s[0] + (s[1] == 8192))
    assert found.best == 7
    assert [load.seconds for load in engines.loads] == [30.0] * 6 + [60.0]
    assert found.seconds == 60.0 * 7
    left = len(every_choice()) - 6
    assert found.stopped == (
        f"{left} of {left + 6} settings were not tried, whose forecast is {rest[5].rate:.2f}"
        " requests/s at most: those with the best forecast were tried"
    )


def test_a_best_that_does_not_do_it_again_is_not_the_best() -> None:
    found = go(Engines({7: TrialEnd(None, "died", "CUDA out of memory")}), starts=6)
    assert [trial.again for trial in found.trials] == [False] * 6 + [True] * 2
    assert found.winner is not None
    assert found.winner.number == 8
    assert found.trials[7].options != found.trials[6].options


def test_starts_and_time_bound_it() -> None:
    few = go(engines := Engines(), starts=3)
    assert len(engines.started) == len(few.trials) == 4
    # Of one there is none to choose.
    assert go(engines := Engines(), starts=1).best == 1
    assert len(engines.started) == 1
    short = go(engines := Engines(), seconds=200.0)
    assert len(engines.started) == 3
    assert short.stopped.endswith(": the time is up")
    assert short.winner is not None
    assert engines.now <= 200.0
    assert len(go(Engines(), seconds=20.0).trials) == 1
    assert go(Engines(), starts=1000).stopped == "all settings were tried"


def test_a_death_is_a_result_and_the_others_go_on() -> None:
    dead = TrialEnd(None, "died", "CUDA out of memory")
    found = go(Engines({1: dead, 2: LaunchError("no port", hint="x")}))
    ends = [(one.outcome, one.why) for one in found.trials[:3]]
    assert ends == [("died", "CUDA out of memory"), ("unserved", "no port"), ("measured", "")]
    assert found.winner is not None
    assert go(Engines(dict.fromkeys(range(1, 9), dead)), starts=4).best is None
    # Two that were measured are tried again; both die then.
    assert go(Engines({3: dead, 4: dead}), starts=2).best is None
    kept = go(Engines(), slo={"ttft": 0.05}, starts=5)  # which nothing keeps
    assert kept.best is None
    assert not any(one.meets_slo for one in kept.trials)


def test_a_signal_leaves_the_best_of_what_was_measured() -> None:
    part = go(engines := Engines({4: STOP}))
    assert (len(part.trials), part.stopped) == (3, "SIGINT")
    assert part.winner is not None
    assert part.winner.measured is not None
    rates = [trial.measured.requests_per_second for trial in part.trials if trial.measured]
    assert part.winner.measured.requests_per_second == max(rates)
    assert len(engines.started) == 4
    with pytest.raises(StoppedError):
        go(Engines({1: STOP}))


def test_an_interrupted_one_takes_no_longer_ones_place() -> None:
    whole, part = go(Engines(), starts=4), go(Engines({3: STOP}))
    assert "an earlier tuning tried 5 settings" in why_not_kept(part, whole)
    assert why_not_kept(part, None) == why_not_kept(whole, part) == why_not_kept(whole, whole) == ""


def test_each_number_of_draft_tokens_is_tried_and_the_fastest_is_kept() -> None:
    """No forecast knows how many tokens are accepted: the order of forecasts decides nothing."""
    request = PlanRequest(
        model="qwen3.5-9b", on="1xa100-40g", images=0, speculative_algorithm="qwen3_5_mtp"
    )
    load = LoadSpec.of(concurrency=8, seconds=30.0, images=0)
    tried: list[int] = []

    def run(plan: Any, _: LoadSpec) -> TrialEnd:
        tried.append(plan.model.draft.tokens if plan.model.draft else 0)
        return TrialEnd(figures_of(result((5.0, 7.0, 9.0, 8.0)[tried[-1]])), "measured")

    found = Tuner(
        drafts_to_try(request, plan(request), load, 8, (0, 1, 2, 3)), load,
        lambda options: plan(request.changed(**options)), run, lambda _: None, at_once=8,
        blank=Tuning(turbofit_version="0", created="", goal="throughput", slo={}, **FACTS),
        starts=6, seconds=1e6,
    ).tune()  # fmt: skip
    assert tried[0] == 1  # the plan as it is
    assert sorted(tried[:4]) == [0, 1, 2, 3]
    assert tried[4:] == [2]  # the best again
    assert found.winner is not None
    assert found.winner.options == {"speculative_num_draft_tokens": 2}
