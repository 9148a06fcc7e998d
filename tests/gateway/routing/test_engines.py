"""Which engine is next, and when the first one is expected."""

from __future__ import annotations

import time

import pytest

from turbofit.gateway.limits.gate import Cost, Gate
from turbofit.gateway.routing.engines import (
    Fleet,
    RoutedEngine,
    Turn,
)


def test_the_engine_that_one_more_request_fills_least_is_next() -> None:
    three = [RoutedEngine(i, "http://x", share, gate=Gate(5)) for i, share in enumerate((1, 1, 2))]
    fleet = Fleet(three)
    for _ in range(8):
        fleet.best(Cost()).outstanding += 1
    assert [engine.outstanding for engine in three] == [2, 2, 4], "by their shares"
    three[2].up = False
    assert fleet.best(Cost()) is three[0], "of equals the first"
    three[0].gate.take(Cost(units=5))
    assert fleet.best(Cost()) is three[1], "the fewest units"
    three[0].up = False
    assert fleet.best(Cost(units=6)) is None, "it has no room"
    turn = Turn("a", together=2, alone=False)
    three[1].turns["its place"] = turn
    another, few = Turn("b", together=2, alone=False), Turn("c", together=1, alone=False)
    best = [fleet.best(Cost(), each) for each in (None, another, few)]
    assert (best, fleet.open) == ([three[1], three[1], None], 1)
    turn.together = 1
    assert fleet.best(Cost(), another) is None
    turn.alone = True
    assert fleet.best(Cost()) is None


def test_who_finds_no_engine_is_told_when_the_first_one_is_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    slow, fast = (RoutedEngine(i, "http://x") for i in range(2))
    fleet = Fleet([slow, fast])
    slow.start_seconds, fast.start_seconds = 200.0, 28.0
    assert fleet.retry_seconds == 5, "none has ended"
    slow.note_death()
    assert fleet.retry_seconds == 60, "no client waits longer"
    fast.note_death()
    assert fleet.retry_seconds == 30
    clock[0] += 29.5
    assert fleet.retry_seconds == 1
    clock[0] += 1
    assert fleet.retry_seconds == 60, "it is late, and the other one is expected later"
    slow.start_seconds = 1.0
    assert fleet.retry_seconds == 5, "both are late"
    fast.succeeded()
    assert fast.start_seconds == 30.5
    fast.note_death()
    fast.rested = True
    clock[0] += 600
    fast.succeeded()
    assert fast.start_seconds == 30.5, "it was left alone"
