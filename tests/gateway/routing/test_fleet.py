"""The heap of notes against looking at every engine."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from turbofit.gateway.limits.cost import Cost
from turbofit.gateway.routing.admission import Admission
from turbofit.gateway.routing.engines import RoutedEngine, least_busy
from turbofit.gateway.routing.fleet import Fleet

LIMITS = st.sampled_from([None, 3, 10])
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["take", "more", "end", "up", "drain", "share", "gate", "leave", "join", "find"]
        ),
        st.integers(0, 200),
        st.integers(0, 6),
    ),
    max_size=120,
)


def expected(fleet: Fleet, cost: Cost, avoid) -> RoutedEngine | None:
    fitting = [engine for engine in fleet if engine.fits(cost) and engine not in avoid]
    return least_busy(fitting) if fitting else None


@settings(max_examples=300, deadline=None)
@given(STEPS, st.integers(0, 150), LIMITS)
def test_the_best_engine_is_the_one_that_a_look_at_all_would_find(steps, count, gate) -> None:
    made = [RoutedEngine(i, "http://x", 1.0 + i % 3, gate=gate, host_limit=8) for i in range(count)]
    fleet, door = Fleet(made), Admission([])
    door._fleet = fleet
    for what, which, number in steps:
        cost = Cost(units=number, host_bytes=which % 5)
        engine = fleet.engines[which % len(fleet)] if len(fleet) else None
        if what == "join":
            made.append(RoutedEngine(len(made), "http://x", gate=gate, host_limit=8))
            fleet.set([*fleet, made[-1]])
        elif engine is None:
            pass
        elif what == "take":
            found = door._best(cost, ())
            assert found is expected(fleet, cost, ())
            if found is not None:
                door.take(found, cost)
                found.outstanding += 1
        elif what == "more":
            engine.outstanding += number
        elif what == "end":
            engine.outstanding = max(0, engine.outstanding - number)
            held = min(number, engine.units), min(which % 5, engine.host_bytes)
            door.release(engine, Cost(units=held[0], host_bytes=held[1]))
        elif what == "up":
            engine.up = not engine.up
        elif what == "drain":
            engine.draining = not engine.draining
        elif what == "share":
            engine.share = 1.0 + number
        elif what == "gate":
            engine.gate = number
            fleet.set(fleet.engines)
        elif what == "leave":
            fleet.set([one for one in fleet if one is not engine])
        avoid = fleet.engines[number : 2 * number]
        for few in ((), avoid):
            assert fleet.best(cost, few) is expected(fleet, cost, few)
            assert door._best(cost, few) is expected(fleet, cost, few)
            assert fleet.others(few) == any(one.takes for one in fleet if one not in few)
        assert fleet.open == sum(one.takes for one in fleet)
    assert len(fleet._notes) <= 4 * len(fleet) + 257


def test_engines_without_room_are_passed_however_many() -> None:
    found = [RoutedEngine(i, "http://x", gate=5) for i in range(300)]
    fleet = Fleet(found)
    for engine in found:
        engine.units = 5
    assert fleet.best(Cost(units=1)) is None
    assert fleet.best(Cost()) is found[0]
    found[250].units = 4
    assert fleet.best(Cost(units=1)) is found[250]
    assert fleet.best(Cost(units=1), (found[250],)) is None
