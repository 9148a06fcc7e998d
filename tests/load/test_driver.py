"""How far a load is, as people read it."""

from __future__ import annotations

import time

import pytest

from tests.load.test_summary import answer
from turbofit.load.driver import LoadRun
from turbofit.load.spec import LoadSpec


async def never(_: object) -> None:
    raise AssertionError


def at(spec: LoadSpec, *, opened: bool = True, closed: bool = False, begun: int = 0) -> str:
    run = LoadRun(spec, (), never)
    run.answers = [answer(0, 1), answer(0, 1, kind="stalled")]
    run._open, run._begun, run.opened = opened, begun, time.perf_counter() - 3.2
    run.closed = run.opened if closed else None
    return run.step().text


CLOSED = LoadSpec.of(concurrency=8, seconds=30.0)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (at(CLOSED, opened=False), "warm-up of the load: 2 of 8 requests, 1 answered, 1 failed"),
        (at(CLOSED), "measuring: 3 of 30 s, 1 answered, 1 failed"),
        (at(CLOSED, closed=True), "last answers: 1 answered, 1 failed"),
        (
            at(LoadSpec.of(requests=40, warm_up=0), begun=2),
            "measuring: 2 of 40 requests, 1 answered, 1 failed",
        ),
        (at(LoadSpec.of(trace="m.jsonl")), "measuring: 1 answered, 1 failed"),
    ],
)
def test_a_load_says_what_it_does_and_how_much_of_it_is_done(text: str, wanted: str) -> None:
    assert text == wanted
