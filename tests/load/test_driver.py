"""What a load sends and when, and how far it is as people read it."""

from __future__ import annotations

import time
from array import array
from itertools import islice

import pytest

from turbofit.core.errors import UsageError
from turbofit.load.client import Answer
from turbofit.load.driver import LoadRun, arrivals, drawn, replayed
from turbofit.load.result import spread, summary
from turbofit.load.spec import LoadSpec
from turbofit.load.trace import TracedRequest


def answer(begun: float, ended: float, tokens: int = 4, kind: str = "") -> Answer:
    one = Answer(begun)
    one.ended, one.kind, one.output_tokens = ended, kind, tokens
    step = (ended - begun) / tokens
    one.pieces = array("d", [begun + step * (n + 1) for n in range(tokens)])
    return one


def run_of(answers, opened: float, closed: float, spec=None) -> LoadRun:
    async def never(_):
        raise AssertionError

    run = LoadRun(spec or LoadSpec.of(concurrency=4), (), never)
    run.answers, run.opened, run.closed = list(answers), opened, closed
    for one in run.answers:
        one.counts = opened <= one.begun < closed
    return run


def at(spec: LoadSpec, *, opened: bool = True, closed: bool = False, begun: int = 0) -> str:
    run = run_of([answer(0, 1), answer(0, 1, kind="stalled")], 0, 0, spec)
    run._open, run._begun, run.opened = opened, begun, time.perf_counter() - 3.2
    run.closed = run.opened if closed else None
    return run.step().text


CLOSED = LoadSpec.of(concurrency=8, seconds=30.0)


@pytest.mark.parametrize(
    ("spec", "facts", "text"),
    [
        (CLOSED, {"opened": False}, "warm-up of the load: 2 of 8 requests, "),
        (CLOSED, {}, "measuring: 3 of 30 s, "),
        (CLOSED, {"closed": True}, "last answers: "),
        (LoadSpec.of(requests=40, warm_up=0), {"begun": 2}, "measuring: 2 of 40 requests, "),
        (LoadSpec.of(trace="m.jsonl"), {}, "measuring: "),
    ],
)
def test_a_load_says_what_it_does_and_how_much_of_it_is_done(spec, facts, text: str) -> None:
    assert at(spec, **facts) == text + "1 answered, 1 failed"


def test_sizes_keep_to_their_spread_and_the_seed_decides() -> None:
    spec = LoadSpec.of(
        prompt_tokens=100, prompt_spread=0.5, output_tokens=10, image_size=((64, 64), (32, 32)),
        images=2,
    )  # fmt: skip
    found = list(islice(drawn(spec), 500))
    assert {one.output_tokens for one in found} == {10}
    prompts = [one.prompt_tokens for one in found]
    assert 50 <= min(prompts) < 60 < 140 < max(prompts) <= 150
    assert abs(sum(prompts) / 500 - 100) < 5
    assert {size for one in found for size in one.images} == {(64, 64), (32, 32)}
    assert found == list(islice(drawn(spec), 500)) != list(islice(drawn(spec.changed(seed=1)), 500))


def test_arrivals_of_an_open_loop() -> None:
    even = list(islice(arrivals(LoadSpec.of(rate=4.0, evenly=True), ()), 5))
    assert even == [0, 0.25, 0.5, 0.75, 1.0]
    times = list(islice(arrivals(LoadSpec.of(rate=4.0), ()), 4001))
    assert times == sorted(times)
    assert abs(times[-1] - 1000) < 60  # four standard deviations of 4,000 arrivals at 4/s


def test_a_trace_is_replayed_once_at_its_speed() -> None:
    trace = (
        TracedRequest(at=0.0, output_tokens=0, prompt_tokens=5),
        TracedRequest(at=4.0, output_tokens=2, images=((8, 8),)),
    )
    assert list(arrivals(LoadSpec.of(trace="t", trace_speed=2.0), trace)) == [0, 2]
    first, second = replayed(trace)
    assert (first.prompt_tokens, first.output_tokens) == (5, 1)
    assert (second.prompt_tokens, second.images) == (1, ((8, 8),))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"concurrency": 4, "rate": 2.0}, "--concurrency and --rate"),
        ({"rate": 2.0, "trace": "t"}, "--rate and --trace"),
        ({"evenly": True}, "--evenly needs --rate"),
        ({"shared_prefix": 300}, "--shared-prefix 300"),
    ],
)
def test_contradictions_are_named(given, says) -> None:
    with pytest.raises(UsageError, match=says):
        LoadSpec.of(**given).check()


@pytest.mark.parametrize(
    ("given", "seconds", "warm_up"),
    [
        ({}, 60, 8),
        ({"requests": 5, "seconds": 2.0}, 2, 8),
        ({"trace": "t"}, None, 0),
        ({"trace": "t", "warm_up": 3}, None, 3),
        ({"requests": 5, "concurrency": 32}, None, 32),
        ({"rate": 2.0}, 60, 8),
    ],
)
def test_a_window_has_an_end_and_a_warm_up_before_it(given, seconds, warm_up) -> None:
    spec = LoadSpec.of(**given)
    assert (spec.measured_seconds, spec.warm_up_requests) == (seconds, warm_up)


def test_percentiles_are_the_least_that_so_many_are_not_above() -> None:
    one = spread([float(n) for n in range(1, 101)])
    assert (one.p50, one.p90, one.p99, one.most, one.mean) == (50, 90, 99, 100, 50.5)
    assert spread([7.0]).p50 == spread([7.0]).p99 == 7
    assert spread([]).count == 0


def test_in_step_answers_are_counted_by_their_share_of_the_window() -> None:
    """Four rows in step, three seconds each: 4/3 a second, wherever the window begins."""
    answers = [answer(3.0 * turn, 3.0 * turn + 3) for turn in range(10) for _ in range(4)]
    for opened, closed in ((3.0, 27.0), (4.0, 24.5), (5.9, 9.0)):
        found = summary(run_of(answers, opened, closed), url="http://u:p@h", model="m", busy=0.0)
        assert found.requests_per_second == pytest.approx(4 / 3)
        assert found.running == pytest.approx(4)
    assert found.url == "http://h"


def test_only_what_began_in_the_window_has_times() -> None:
    answers = [answer(0, 2), answer(1, 5), answer(3, 4), answer(3.5, 9, kind="stalled")]
    found = summary(run_of(answers, 1.0, 4.0), url="http://h", model="m", busy=0.9)
    assert (found.begun, found.answered) == (3, 2)
    assert found.e2e.most == 4
    assert [(one.kind, one.count) for one in found.errors] == [("stalled", 1)]
    assert found.output_tokens_per_second == pytest.approx((3 + 2 + 3) / 3)
    assert any("90% of a CPU" in text for text in found.warnings)
