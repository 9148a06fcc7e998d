"""Which engine is next, and what clients are told where none is."""

from __future__ import annotations

import time

import pytest

from tests.support.gateway import Recorder, ask, chat, gateway
from turbofit.gateway.limits.gate import Cost, Gate
from turbofit.gateway.routing.engines import Fleet, RoutedEngine, Turn


def test_the_engine_that_one_more_request_fills_least_is_next() -> None:
    found = [RoutedEngine(i, "http://x", share, gate=Gate(5)) for i, share in enumerate((1, 1, 2))]
    fleet = Fleet(found)
    assert fleet.best(Cost()) is found[2], "the largest share"
    found[2].outstanding = 1
    assert fleet.best(Cost()) is found[0], "of equals the first"
    found[0].gate.counted = 5
    assert fleet.best(Cost()) is found[1], "the fewest units"
    found[0].up = found[2].up = False
    assert fleet.best(Cost(units=6)) is None, "it has no room"
    turn = Turn("a", alone=False, longer=False)
    found[1].turn_of = turn
    assert (fleet.best(Cost(), turn), fleet.best(Cost()), fleet.open) == (None, found[1], 1)
    turn.alone = True
    assert fleet.best(Cost()) is None


def test_a_gateway_without_a_network_gives_up_soon() -> None:
    recorder = Recorder()
    recorder.down = set(range(100))
    app, _ = gateway(engines=100, recorder=recorder)
    reply = ask(app, body=chat())
    assert (reply.status, reply.json["error"]["code"]) == (503, "engine_unavailable")
    assert sum(not engine.up for engine in app.engines) == 16


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
    clock[0] += 300
    fast.succeeded()
    fast.note_death()
    assert fleet.dead().retry_after == fleet.retry_seconds == 33, "the slow one is later than ever"
    fast.rested = True
    clock[0] += 600
    fast.succeeded()
    assert fast.start_seconds == 30.5, "it was left alone"
