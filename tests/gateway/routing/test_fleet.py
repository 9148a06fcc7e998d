"""The heap of notes against looking at every engine."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbofit.gateway.limits.cost import Cost
from turbofit.gateway.limits.gate import Gate
from turbofit.gateway.routing.admission import Admission, dead
from turbofit.gateway.routing.engines import RoutedEngine, least_busy
from turbofit.gateway.routing.fleet import Fleet
from turbofit.gateway.routing.suspects import Turn

LIMITS = st.sampled_from([None, 3, 10])
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["take", "more", "end", "up", "share", "turn", "leave", "join", "find"]),
        st.integers(0, 200),
        st.integers(0, 6),
    ),
    max_size=120,
)


def expected(fleet: Fleet, cost: Cost) -> RoutedEngine | None:
    fitting = [engine for engine in fleet if engine.fits(cost)]
    return least_busy(fitting) if fitting else None


@settings(max_examples=300, deadline=None)
@given(STEPS, st.integers(0, 150), LIMITS)
def test_the_best_engine_is_the_one_that_a_look_at_all_would_find(steps, count, gate) -> None:
    def engine_of(index: int, share: float) -> RoutedEngine:
        limit = None if gate is None else Gate(gate)
        return RoutedEngine(index, "http://x", share, gate=limit, host_limit=8)

    made = [engine_of(i, 1.0 + i % 3) for i in range(count)]
    held: dict[RoutedEngine, list[Cost]] = {}
    fleet, door = Fleet(made), Admission([])
    door._fleet = fleet
    for what, which, number in steps:
        cost = Cost(units=number, host_bytes=which % 5)
        engine = fleet.engines[which % len(fleet)] if len(fleet) else None
        if what == "join":
            made.append(engine_of(len(made), 1.0))
            fleet.set([*fleet, made[-1]])
        elif engine is None:
            pass
        elif what == "take":
            found = door._best(cost)
            assert found is expected(fleet, cost)
            if found is not None:
                held.setdefault(door._take(found, cost, None, None), []).append(cost)
                found.outstanding += 1
        elif what == "more":
            engine.outstanding += number
        elif what == "end":
            engine.outstanding = max(0, engine.outstanding - number)
            if held.get(engine):
                door.release(engine, held[engine].pop(number % len(held[engine])))
        elif what == "up":
            engine.up = not engine.up
        elif what == "turn":
            engine.turn_of = None if number % 2 else Turn("b", alone=number > 3, longer=False)
            fleet.set(fleet.engines)
        elif what == "share":
            engine.share = 1.0 + number
        elif what == "leave":
            fleet.set([one for one in fleet if one is not engine])
        for turn in (None, Turn("a", alone=False, longer=False)):
            fitting = [one for one in fleet if one.fits(cost, turn)]
            best = least_busy(fitting) if fitting else None
            assert fleet.best(cost, turn) is best
            assert door._best(cost, turn) is best
        assert fleet.open == sum(one.takes for one in fleet)
    assert len(fleet._notes) <= 4 * len(fleet) + 257


def test_engines_without_room_are_passed_however_many() -> None:
    found = [RoutedEngine(i, "http://x", gate=Gate(5)) for i in range(300)]
    fleet, costs = Fleet(found), [Cost(units=5) for _ in range(300)]
    door = Admission(fleet)
    for engine, cost in zip(found, costs, strict=True):
        door._take(engine, cost, None, None)
    assert fleet.best(Cost(units=1)) is None
    assert fleet.best(Cost()) is found[0]
    door.release(found[250], costs[250])
    door._take(found[250], Cost(units=4), None, None)
    assert fleet.best(Cost(units=1)) is found[250]


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
    assert dead(fleet).retry_after == fleet.retry_seconds == 33, "the slow one is later than ever"
    fast.rested = True
    clock[0] += 600
    fast.succeeded()
    assert fast.start_seconds == 30.5, "it was left alone"
