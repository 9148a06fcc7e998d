"""Requests that have not begun to be answered, and the engines that they lose."""

from __future__ import annotations

import asyncio

import pytest

from tests.gateway.routing.dying_engines import DyingEngines, broken, serving, vanish
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


def test_what_was_begun_is_not() -> None:
    recorder = Recorder(lambda *_: stream(EVENT, OSError("reset")))
    app, _ = gateway(engines=2, recorder=recorder)
    reply = ask(app, body=chat(stream=True))
    assert reply.status == 200
    assert b'"engine_died"' in reply.body
    assert len(recorder.seen) == 1


def test_a_request_is_sent_again_once() -> None:
    recorder = Recorder(vanish)
    app, _ = gateway(engines=9, recorder=recorder)
    reply = ask(app, body=chat())
    assert (reply.status, reply.json["error"]["code"]) == (503, "engine_died")
    assert [seen[0] for seen in recorder.seen] == [0, 1]


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
    waiting = mortal.send("innocent")
    await mortal.until(1)
    mortal.app.monitor.gone(mortal.app.engines[0], vanished=vanished)
    mortal.release()
    (reply,) = await mortal.settled(waiting)
    assert reply.status == 200
    assert mortal.times("innocent") == ([0, 1] if vanished else [0])
    assert not mortal.app.engines[0].up


def test_an_engine_s_own_error_is_its_answer() -> None:
    recorder = Recorder(lambda *_: Answer(b'{"message":"no"}', status=500))
    app, _ = gateway(engines=2, recorder=recorder)
    assert ask(app, body=chat()).status == 500
    assert len(recorder.seen) == 1


def test_the_same_engine_is_never_asked_again() -> None:
    recorder = Recorder(vanish)
    app, _ = gateway(engines=2, recorder=recorder)
    assert ask(app, body=chat()).json["error"]["code"] == "engine_died"
    assert [seen[0] for seen in recorder.seen] == [0, 1]


@pytest.mark.parametrize("full", [False, True])
async def test_a_body_is_kept_until_the_answer_begins_and_no_longer(full: bool) -> None:
    app, _ = gateway(engines=2, recorder=Recorder(lambda *_: stream(0.05, EVENT, 0.05, DONE)))
    other = app._bodies._room // 2 if full else 0
    app._bodies.keep(other)
    pending = asyncio.ensure_future(call(app, body=chat(image_part(), stream=True)))
    await settled()
    early = app._bodies.in_memory - other
    await asyncio.sleep(0.05)
    await settled()
    late = app._bodies.in_memory - other
    await pending
    assert (early == 0, late, app._bodies.in_memory - other) == (full, 0, 0)


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
