"""Requests that have not begun to stream survive the engine that had them."""

from __future__ import annotations

import asyncio

import pytest

from tests.gateway.support import (
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


def broken(*_):
    return OSError("reset")


@pytest.mark.parametrize(
    "first",
    [
        lambda: OSError("reset"), lambda: stream(OSError("reset")), stream,
        lambda: stream(EVENT[:9], OSError("reset")), lambda: Answer(b'{"half', OSError("reset")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("body", [chat(image_part(), stream=True), chat(image_part(), n=2)])
def test_what_was_not_begun_is_asked_of_another(first, body) -> None:
    recorder = Recorder(lambda engine, *_: first() if engine.index == 0 else stream(EVENT, DONE))
    app, _ = gateway(engines=2, recorder=recorder)
    reply = ask(app, body=body)
    assert (reply.status, reply.body) == (200, EVENT + DONE)
    assert [seen[0] for seen in recorder.seen] == [0, 1]
    assert recorder.bodies[0] == recorder.bodies[1]
    text = ask(app, "/metrics").body.decode()
    assert "turbofit_gateway_retried_total 1\n" in text
    assert 'turbofit_gateway_engine_failures_total{engine="0"} 1\n' in text
    left = [(e.units, e.host_bytes, e.outstanding) for e in app.engines]
    assert left == [(0, 0, 0)] * 2
    assert app._bodies.in_memory == 0


def test_what_was_begun_is_not() -> None:
    recorder = Recorder(lambda *_: stream(EVENT, OSError("reset")))
    app, _ = gateway(engines=2, recorder=recorder)
    reply = ask(app, body=chat(stream=True))
    assert reply.status == 200
    assert b'"engine_died"' in reply.body
    assert len(recorder.seen) == 1


def test_three_engines_at_most_have_one_request() -> None:
    recorder = Recorder(broken)
    app, _ = gateway(engines=9, recorder=recorder)
    reply = ask(app, body=chat())
    assert (reply.status, reply.json["error"]["code"]) == (503, "engine_died")
    assert [seen[0] for seen in recorder.seen] == [0, 1, 2]


def test_engines_that_are_not_reached_do_not_count() -> None:
    recorder = Recorder(lambda engine, *_: OSError("reset") if engine.index == 0 else stream(EVENT))
    recorder.down = {1, 2, 3, 4}
    app, _ = gateway(engines=6, recorder=recorder)
    assert ask(app, body=chat()).body == EVENT
    assert [engine.up for engine in app.engines] == [False] * 5 + [True]


def test_an_engine_s_own_error_is_its_answer() -> None:
    recorder = Recorder(lambda *_: Answer(b'{"message":"no"}', status=500))
    app, _ = gateway(engines=2, recorder=recorder)
    assert ask(app, body=chat()).status == 500
    assert len(recorder.seen) == 1


def test_the_same_engine_is_never_asked_again() -> None:
    recorder = Recorder(broken)
    app, _ = gateway(engines=2, recorder=recorder)
    assert ask(app, body=chat()).json["error"]["code"] == "engine_died"
    assert [seen[0] for seen in recorder.seen] == [0, 1]


def test_a_body_is_kept_until_the_answer_begins_and_no_longer() -> None:
    async def run(full: bool):
        app, _ = gateway(engines=2, recorder=Recorder(lambda *_: stream(0.05, EVENT, 0.05, DONE)))
        other = app._bodies._room // 2 if full else 0
        app._bodies.keep(other)
        asked = asyncio.ensure_future(call(app, body=chat(image_part(), stream=True)))
        await asyncio.sleep(0.02)
        early = app._bodies.in_memory - other
        await asyncio.sleep(0.05)
        late = app._bodies.in_memory - other
        await asked
        return early > 0, late, app._bodies.in_memory - other

    assert asyncio.run(run(False)) == (True, 0, 0)
    assert asyncio.run(run(True)) == (False, 0, 0)


def test_without_room_for_its_body_a_request_is_not_sent_again() -> None:
    async def run():
        def answer(*_):
            return stream(0.01, OSError("reset"))

        app, recorder = gateway(engines=2, recorder=Recorder(answer))
        app._bodies.keep(app._bodies._room // 2)
        reply = await call(app, body=chat(image_part(), stream=True))
        return reply, len(recorder.seen)

    reply, asked = asyncio.run(run())
    assert (reply.status, asked) == (503, 1)


def test_a_retry_goes_before_those_who_wait_and_holds_nobody_up() -> None:
    async def run():
        order = []

        async def answer(engine, path, body):
            order.append((engine.index, body.count(b"first") > 0))
            if len(order) == 1:
                await asyncio.sleep(0.05)
                return OSError("reset")
            return Answer(0.1, b"{}")

        app, _ = gateway(engines=2, recorder=Recorder(answer))
        for engine in app.engines:
            engine.gate = 13
        app.fleet.set(app.engines)

        def body(text):
            return chat(image_part(1792, 1344), {"type": "text", "text": text})

        calls = [asyncio.ensure_future(call(app, body=body("first")))]
        for number in range(3):
            await asyncio.sleep(0.005)
            calls.append(asyncio.ensure_future(call(app, body=body(f"x{number}"))))
        replies = await asyncio.wait_for(asyncio.gather(*calls), 5)
        return order, [reply.status for reply in replies]

    order, statuses = asyncio.run(run())
    assert statuses == [200] * 4
    # Engine 0 broke the first off, and gets nothing new; engine 1 had the first next of all.
    assert order == [(0, True), (1, False), (1, True), (1, False), (1, False)]


def test_an_engine_that_breaks_off_gets_nothing_new_until_it_answers() -> None:
    """It has nothing to do, so that it would be chosen first, again and again."""

    async def run():
        working = False

        def answer(engine, path, body):
            return broken() if engine.index == 0 and not working else stream(EVENT, DONE)

        app, recorder = gateway(engines=2, recorder=Recorder(answer), retry_seconds=0.0)
        await app.startup()
        try:
            replies = [await call(app, body=chat(stream=True)) for _ in range(20)]
            asked = [seen[0] for seen in recorder.seen]
            working = True
            for _ in range(100):
                if app.engines[0].up:
                    break
                await asyncio.sleep(0.02)
            return [reply.status for reply in replies], asked, app.engines[0].up
        finally:
            await app.shutdown()

    statuses, asked, up = asyncio.run(run())
    assert statuses == [200] * 20
    assert asked.count(0) <= 2
    assert up


def test_a_client_that_left_is_not_sent_on() -> None:
    async def run():
        gone = asyncio.Event()
        app, recorder = gateway(engines=2, recorder=Recorder(lambda *_: stream(5.0, EVENT)))
        asked = asyncio.ensure_future(call(app, body=chat(stream=True), leave=gone))
        await asyncio.sleep(0.02)
        gone.set()
        app.engines[0].abort_all()
        await asyncio.wait_for(asyncio.gather(asked, return_exceptions=True), 2)
        return len(recorder.seen), [e.outstanding for e in app.engines], app._bodies.in_memory

    assert asyncio.run(run()) == (1, [0, 0], 0)
