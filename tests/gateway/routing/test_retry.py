"""Requests that lose their engine: by its death, with the innocent beside them, or otherwise."""

from __future__ import annotations

import asyncio

import pytest

from tests.gateway.routing.dying_engines import (
    POISON,
    DyingEngines,
    broken,
    metric,
    serving,
    vanish,
)
from tests.support.gateway import (
    DONE,
    EVENT,
    Answer,
    Recorder,
    ask,
    call,
    chat,
    gateway,
    image_part,
    stream,
)
from tests.support.waiting import auntil
from tests.virtual_time import settled
from turbofit.gateway.routing.engines import RoutedEngine


@pytest.mark.parametrize("engines", [2, 9])
def test_a_request_is_sent_again_once(engines: int) -> None:
    recorder = Recorder(vanish)
    app, _ = gateway(engines=engines, recorder=recorder)
    reply = ask(app, body=chat())
    assert (reply.status, reply.json["error"]["code"]) == (503, "engine_died")
    assert [request[0] for request in recorder.seen] == [0, 1]


def test_engines_that_are_not_reached_do_not_count() -> None:
    recorder = Recorder(lambda engine, *_: vanish() if engine.index == 0 else stream(EVENT))
    recorder.down = {1, 2, 3, 4}
    app, _ = gateway(engines=6, recorder=recorder)
    assert ask(app, body=chat()).body == EVENT
    assert [engine.up for engine in app.engines] == [False] * 5 + [True]


@pytest.mark.parametrize("vanished", [False, True])
async def test_who_waits_where_nothing_listens_any_more(vanished) -> None:
    """A silent connection tells of all others there; a refused one only that nobody listens."""
    mortal = DyingEngines(2)
    waiting = await mortal.send("innocent")
    mortal.app.monitor.gone(mortal.app.engines[0], vanished=vanished)
    mortal.release()
    assert (await waiting).status == 200
    assert mortal.times("innocent") == ([0, 1] if vanished else [0])
    assert not mortal.app.engines[0].up


@pytest.mark.parametrize(("engines", "full"), [(1, False), (2, False), (2, True)])
async def test_a_body_is_kept_for_another_engine_until_the_answer_begins(
    engines: int, full: bool
) -> None:
    app, _ = gateway(engines=engines, recorder=Recorder(lambda *_: stream(0.05, EVENT, 0.05, DONE)))
    other = app._bodies._room // 2 if full else 0
    app._bodies.keep(other)
    pending = asyncio.ensure_future(call(app, body=chat(image_part(), stream=True)))
    await settled()
    early = app._bodies.in_memory - other
    await asyncio.sleep(0.05)
    await settled()
    late = app._bodies.in_memory - other
    await pending
    kept = engines > 1 and not full
    assert (early > 0, late, app._bodies.in_memory - other) == (kept, 0, 0)


async def test_without_room_for_its_body_a_request_is_not_sent_again() -> None:
    def answer(*_):
        return stream(0.01, vanish())

    app, recorder = gateway(engines=2, recorder=Recorder(answer))
    app._bodies.keep(app._bodies._room // 2)
    reply = await call(app, body=chat(image_part(), stream=True))
    assert (reply.status, len(recorder.seen)) == (503, 1)


async def test_an_engine_that_breaks_off_gets_nothing_new_until_it_answers() -> None:
    """It has nothing to do, so that it would be chosen first, again and again."""
    working = False

    def answer(engine, path, body):
        return broken() if engine.index == 0 and not working else stream(EVENT, DONE)

    app, recorder = gateway(engines=2, recorder=Recorder(answer), retry_seconds=0.0)
    async with serving(app):
        replies = [await call(app, body=chat(stream=True, seed=n)) for n in range(20)]
        asked = [index for index, *_ in recorder.seen]
        working = True
        await auntil(lambda: app.engines[0].up, "the engine to be asked again")
    assert [reply.status for reply in replies] == [503] + [200] * 19
    assert asked.count(0) == 1


async def test_a_client_that_left_is_not_sent_on() -> None:
    gone = asyncio.Event()
    app, recorder = gateway(engines=2, recorder=Recorder(lambda *_: stream(5.0, EVENT)))
    pending = asyncio.ensure_future(call(app, body=chat(stream=True), leave=gone))
    await settled()
    gone.set()
    app.engines[0].abort_all()
    await asyncio.wait_for(asyncio.gather(pending, return_exceptions=True), 2)
    assert len(recorder.seen) == 1
    assert [e.outstanding for e in app.engines] == [0, 0]
    assert app._bodies.in_memory == 0


@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize("engines", [1, 2, 8])
async def test_what_an_engine_had_when_it_died_is_sent_to_no_other(engines, loops) -> None:
    mortal = DyingEngines(engines, loops=loops)
    crowd = [await mortal.send(f"innocent {number}") for number in range(3 * engines)]
    reply = await (await mortal.send(POISON))
    mortal.release()
    beside = await asyncio.gather(*crowd)
    after = [await (await mortal.send("innocent after it"))] if engines > 1 else []
    assert (reply.status, reply.json["error"]["code"]) == (503, "engine_died")
    assert "retry-after" in reply.headers
    assert (len(mortal.dead), len(mortal.times(POISON))) == (1, 1)
    assert [one.status for one in after] == [200] * len(after)
    for number, one in enumerate(beside):
        there = set(mortal.times(f"innocent {number}"))
        assert one.status == (503 if there <= mortal.dead else 200)
        assert len(mortal.times(f"innocent {number}")) == 1
    assert [one.status for one in beside].count(503) == 3
    assert metric(await call(mortal.app, "/metrics"), "retried_total") == 0
    left = [(e.outstanding, e.units, e.host_bytes) for e in mortal.app.engines]
    assert left == [(0, 0, 0)] * engines
    assert mortal.app._bodies.in_memory == 0


@pytest.mark.parametrize(
    "first",
    [
        vanish, lambda: stream(vanish()), lambda: stream(EVENT[:9], vanish()),
        lambda: Answer(b'{"half', vanish()),
    ],
)  # fmt: skip
@pytest.mark.parametrize("body", [chat(image_part(), stream=True), chat(image_part(), n=2)])
def test_who_loses_a_machine_is_sent_again_to_the_last_engine_too(first, body) -> None:
    recorder = Recorder(lambda engine, *_: first() if engine.index == 0 else stream(EVENT, DONE))
    app, _ = gateway(engines=2, recorder=recorder)
    reply = ask(app, body=body)
    assert (reply.status, reply.body) == (200, EVENT + DONE)
    assert [request[0] for request in recorder.seen] == [0, 1]
    assert recorder.bodies[0] == recorder.bodies[1]
    text = ask(app, "/metrics").body.decode()
    assert "turbofit_gateway_retried_total 1\n" in text
    assert 'turbofit_gateway_engine_failures_total{engine="0"} 1\n' in text
    left = [(e.units, e.host_bytes, e.outstanding) for e in app.engines]
    assert left == [(0, 0, 0)] * 2
    assert app._bodies.in_memory == 0


def test_who_meets_a_connection_that_a_dead_engine_kept_is_at_the_same_death() -> None:
    """It was sent just after the death; what dies seconds later is another process."""
    engine = RoutedEngine(0, "http://127.0.0.1:9000")
    death = engine.note_death()
    assert engine.note_death(engine.died_at + 0.01) is death
    assert engine.note_death(engine.died_at + 5) is not death
