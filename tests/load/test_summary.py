from __future__ import annotations

from array import array

import pytest

from turbofit.load.answer import Answer
from turbofit.load.driver import LoadRun
from turbofit.load.result import spread, summary
from turbofit.load.spec import LoadSpec


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
