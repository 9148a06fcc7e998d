"""The line of suspects: alone on an engine, the least suspected first, never on the last one."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests import virtual_time
from tests.gateway.quarantine.test_suspects import accused
from tests.gateway.routing.test_quarantine import Fleet as EndingFleet
from tests.virtual_time import settled
from tests.waiting import auntil
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.cost import Cost
from turbofit.gateway.limits.gate import Gate
from turbofit.gateway.quarantine.fingerprints import Fingerprints
from turbofit.gateway.quarantine.identity import Departure, RequestIdentity
from turbofit.gateway.quarantine.quarantined import EngineDeath
from turbofit.gateway.quarantine.suspects import Suspects
from turbofit.gateway.routing.admission import Admission
from turbofit.gateway.routing.engines import RoutedEngine
from turbofit.gateway.routing.fleet import Fleet
from turbofit.gateway.routing.trials import Trials

FREE = Cost()


class Line:
    """Engines that serve, their doors, and suspects a, b, c of one death."""

    def __init__(self, engines: int, **config) -> None:
        clock = asyncio.get_running_loop().time
        self.engines = [RoutedEngine(index, f"http://e{index}") for index in range(engines)]
        for engine in self.engines:
            engine.succeeded()
        self.fleet = Fleet(self.engines)
        self.door = Admission(self.fleet)
        self.suspects = Suspects(clock)
        self.asked: list[RoutedEngine] = []
        death = EngineDeath(9)
        for name in "abc":
            self.suspects.accuse(death, accused(name))
        self.trials = Trials(
            self.fleet, self.door, self.suspects, clock, self.asked.append, **config
        )

    def ask(self, name: str, client: str = "somebody", **facts) -> asyncio.Task:
        return asyncio.ensure_future(self.trials.admit(client, name, FREE, **facts))

    async def take(self, engine: RoutedEngine) -> None:
        """A request of somebody else."""
        self.door.take(engine, FREE)
        await settled()

    def leave(self, engine: RoutedEngine) -> None:
        self.door.release(engine, FREE)
        self.trials.pump()


async def moments(seconds: float = 0.3) -> None:
    """Everybody who was at the death has come."""
    await asyncio.sleep(seconds)


def test_one_at_a_time_the_least_suspected_first_and_the_newest_last() -> None:
    async def run():
        line = Line(3)
        line.suspects.accuse(EngineDeath(8), accused("a"))
        pending = {
            "a": line.ask("a", since=1.0), "b": line.ask("b", since=3.0),
            "c": line.ask("c", since=2.0),
        }  # fmt: skip
        order = []
        for _ in range(3):
            await moments()
            (now,) = [name for name, task in pending.items() if task.done() and name not in order]
            order.append(now)
            engine = pending[now].result()
            assert not engine.fits(FREE)
            assert sum(one.fits(FREE) for one in line.engines) == 2
            line.trials.release(engine, FREE)
        return order, [engine.reserved for engine in line.engines], line.trials.waiting

    assert virtual_time.run(run()) == (["c", "b", "a"], [False] * 3, 0)


def test_of_equal_suspects_one_runs_at_a_time() -> None:
    async def run():
        line = Line(8)  # where two suspects may run at once
        equal = [line.ask("a"), line.ask("a"), line.ask("b")]
        await moments()
        running = [task.done() for task in equal]
        line.trials.release(await equal[0], FREE)
        return running, (await equal[1]) in line.engines

    assert virtual_time.run(run()) == ([True, False, True], True)


async def a_suspect_waits() -> tuple[Line, asyncio.Task[RoutedEngine | None]]:
    """Two engines that are taken, and a suspect that waits for one of them."""
    line = Line(2)
    for engine in line.engines:
        await line.take(engine)
    trial = line.ask("a")
    await moments()
    return line, trial


def test_it_waits_until_an_engine_is_empty_and_nobody_new_comes_there() -> None:
    async def run():
        line, trial = await a_suspect_waits()
        (kept,) = [engine for engine in line.engines if engine.reserved]
        new = await line.door.admit("x", FREE)
        assert not trial.done()
        assert new is not kept
        line.leave(kept)
        assert await trial is kept
        await moments(29.0)
        assert kept.reserved
        await moments(1.1)  # half a minute alone is enough
        return kept.reserved, kept.fits(FREE)

    assert virtual_time.run(run()) == (False, True)


def test_of_two_engines_it_has_the_one_that_is_empty_first() -> None:
    async def run():
        line, trial = await a_suspect_waits()
        (other,) = [engine for engine in line.engines if not engine.reserved]
        line.leave(other)
        assert await trial is other
        return [engine.reserved for engine in line.engines if engine is not other]

    assert virtual_time.run(run()) == [False]


def test_none_runs_on_the_last_engine_of_several() -> None:
    async def run():
        line = Line(2, seconds=5.0)
        line.engines[0].up = False
        waits, again = line.ask("a"), line.ask("b", avoid=(line.engines[0],))
        replies = await asyncio.gather(waits, again, return_exceptions=True)
        return [(one.status, one.reason, one.retry_after) for one in replies]

    assert virtual_time.run(run()) == [(503, "suspect_waits", 10), (503, "engine_died", 5)]


def test_it_runs_when_a_second_engine_is_back() -> None:
    async def run():
        line = Line(2)
        line.engines[0].note_death()
        pending = line.ask("a")
        await moments()
        assert not pending.done()
        line.engines[0].succeeded()
        line.trials.pump()
        return (await pending).index

    assert virtual_time.run(run()) in (0, 1)


@pytest.mark.parametrize("engines", [1, 2])
def test_an_engine_that_answered_nobody_since_it_ended_is_asked_first(engines) -> None:
    """It may die of itself, which must convict nobody."""

    async def run():
        line = Line(engines)
        for engine in line.engines:
            engine.note_end()
        assert line.asked == []
        pending = line.ask("a")
        await moments()
        assert not pending.done()
        assert set(line.asked) == set(line.engines)
        for engine in line.engines:
            engine.succeeded()
        line.trials.pump()
        trial = await pending
        before = len(line.asked)
        line.trials.release(trial, FREE)
        return trial in line.engines, len(line.asked) - before

    assert virtual_time.run(run()) == (True, 0)


@pytest.mark.parametrize(("engines", "at_once"), [(1, 1), (3, 1), (7, 1), (8, 2), (12, 3)])
def test_one_engine_in_four_is_put_at_risk(engines, at_once) -> None:
    async def run():
        line = Line(engines)
        pending = [line.ask(name) for name in "abc"]
        await moments()
        done = sum(one.done() for one in pending)
        for one in pending:
            one.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        return done, sum(engine.reserved for engine in line.engines)

    assert virtual_time.run(run()) == (at_once, at_once)


def test_who_leaves_gives_its_engine_back() -> None:
    async def run():
        line = Line(2)
        first, second = line.ask("a"), line.ask("b")
        first.cancel()
        await moments()
        engine = await second
        line.trials.release(engine, FREE)
        return [one.places for one in line.engines], [one.reserved for one in line.engines]

    assert virtual_time.run(run()) == ([0, 0], [False, False])


@pytest.mark.parametrize("answers", [True, False])
def test_an_engine_is_kept_until_it_has_outlived_a_suspect_that_left(answers) -> None:
    """Else it would convict the next one by dying of the one before."""

    async def run():
        line = Line(2)
        first, second = line.ask("a"), line.ask("b")
        engine = await first
        line.trials.release(engine, FREE, 10.0)
        await moments(5.0)
        before = line.asked[-1] is engine, engine.reserved, second.done()
        if answers:
            engine.succeeded()
            line.trials.pump()
        else:
            await moments(6.0)
        await moments()
        return before, second.done()

    assert virtual_time.run(run()) == ((True, True, False), True)


def test_who_is_no_suspect_any_more_goes_as_others_do() -> None:
    async def run():
        line, trial = await a_suspect_waits()
        line.suspects.acquit("a", ())
        line.trials.pump()
        found = await trial
        return found, [engine.reserved for engine in line.engines]

    assert virtual_time.run(run()) == (None, [False, False])


def test_who_was_sent_again_by_the_gateway_runs_alone_whatever_was_explained() -> None:
    async def run():
        line = Line(3)
        for engine in line.engines[1:]:
            await line.take(engine)
        pending = line.ask("a", avoid=(line.engines[0],))
        await moments()
        line.suspects.forget("a")
        line.trials.pump()
        assert not pending.done()
        line.leave(line.engines[1])
        line.leave(line.engines[2])
        return (await pending).index

    assert virtual_time.run(run()) in (1, 2)


def test_the_only_engine_is_shared_with_others_by_time() -> None:
    async def run():
        line = Line(1)
        (engine,) = line.engines
        await line.take(engine)
        pending = line.ask("a")
        await moments()
        assert engine.reserved
        other = asyncio.ensure_future(line.door.admit("x", FREE))
        await moments(9.0)
        assert not other.done()
        await moments(1.0)  # it did not empty within ten seconds
        assert await other is engine
        line.leave(engine)
        line.leave(engine)
        await moments(5.0)
        assert not pending.done()
        await moments(5.0)  # others had it as long
        return pending.done()

    assert virtual_time.run(run())


def test_the_only_engine_goes_to_a_suspect_once_it_has_outlived_who_left() -> None:
    """Others wait for it longer than they would; else it would be kept from them in vain."""

    async def run():
        line = Line(1)
        (engine,) = line.engines
        await line.take(engine)
        pending = line.ask("a")
        await moments()
        other = asyncio.ensure_future(line.door.admit("x", FREE))
        await moments(4.7)
        engine.arrivals += 1
        who = RequestIdentity(Fingerprints(b"key"), "/", b"{}", ())
        engine.left.append(Departure(time.monotonic(), who, True, engine.arrivals, False))
        line.leave(engine)
        await moments(9.9)
        before = pending.done()
        await moments(0.2)
        given = pending.done(), other.done()
        line.trials.release(await pending, FREE)
        return before, given, await other is engine

    assert virtual_time.run(run()) == (False, (True, False), True)


def test_without_any_engine_it_is_told_so() -> None:
    async def run():
        line = Line(2)
        for engine in line.engines:
            engine.up = False
        with pytest.raises(Refusal) as caught:
            await line.trials.admit("somebody", "a", FREE)
        return caught.value.reason

    assert virtual_time.run(run()) == "engine_unavailable"


def test_the_line_is_bounded() -> None:
    async def run():
        line = Line(1, longest=2)
        await line.take(line.engines[0])
        pending = [line.ask(name) for name in "ab"]
        await settled()
        with pytest.raises(Refusal) as caught:
            await line.trials.admit("somebody", "c", FREE)
        for one in pending:
            one.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        return caught.value.reason, line.trials.waiting

    assert virtual_time.run(run()) == ("suspect_waits", 0)


def test_nobody_is_kept_out_of_the_line_by_the_suspects_of_one_client() -> None:
    async def run():
        line = Line(1, longest=3)
        await line.take(line.engines[0])
        many = [line.ask("a", "many", since=float(at)) for at in range(3)]
        await settled()
        few = [line.ask(name, "few", since=9.0) for name in "bc"]
        await settled()
        ended = [one.done() for one in (*many, *few)]
        reasons = [one.exception().reason for one in (many[2], few[1])]
        for one in (*many, *few):
            one.cancel()
        await asyncio.gather(*many, *few, return_exceptions=True)
        return ended, reasons, line.trials.waiting

    ended, reasons, waiting = virtual_time.run(run())
    assert ended == [False, False, True, False, True]  # the newest of many, and few's second
    assert reasons == ["suspect_waits", "suspect_waits"]
    assert waiting == 0


def test_an_engine_with_too_small_a_gate_is_not_kept_for_it() -> None:
    async def run():
        line = Line(2)
        line.engines[0].gate = Gate(4)
        pending = asyncio.ensure_future(line.trials.admit("somebody", "a", Cost(units=5)))
        await moments()
        engine = await pending
        return engine.index, engine.units

    assert virtual_time.run(run()) == (1, 5)


def test_an_engine_that_a_suspect_has_for_long_is_not_kept_for_the_next() -> None:
    """It is the least busy one, and does not get idle."""

    async def run():
        line = Line(2)
        first = await line.ask("a")
        other = next(engine for engine in line.engines if engine is not first)
        await line.take(other)
        other.outstanding += 2
        await moments(30.1)  # others may come to the first one now
        assert not first.reserved
        second = line.ask("b")
        await moments()
        kept = [engine for engine in line.engines if engine.reserved]
        other.outstanding = 0
        line.leave(other)
        return kept == [other], await second is other

    assert virtual_time.run(run()) == (True, True)


@pytest.mark.parametrize(("others", "seconds"), [(True, (9, 12)), (False, (0, 3))])
def test_others_have_the_only_engine_first_after_its_start(others, seconds) -> None:
    """A suspect may end it at once, and with it whoever has come back by then."""

    async def run():
        async with EndingFleet(1, api_keys=("a", "b")) as fleet:
            await fleet.all_up()
            if others:
                await fleet.ask("other", "b")
            beside = asyncio.ensure_future(fleet.ask("innocent", "a"))
            await auntil(lambda: fleet.app.engines[0].outstanding, "it to be sent")
            fleet.kill(0)
            await beside
            await fleet.all_up()
            began = time.monotonic()
            suspect = asyncio.ensure_future(fleet.ask("innocent", "a"))
            other = await fleet.ask("other", "b") if others else None
            waited = time.monotonic() - began
            reply = await suspect
            return other, waited, reply.status, time.monotonic() - began

    other, waited, status, took = virtual_time.run(run())
    assert other is None or other.status == 200
    assert waited < 2
    assert status == 200
    assert seconds[0] < took < seconds[1]
