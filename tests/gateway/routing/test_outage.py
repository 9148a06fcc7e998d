"""What clients are told while a supervisor leaves all engines alone."""

from __future__ import annotations

import asyncio

from tests.gateway.routing.dying_engines import serving
from tests.support.gateway import Recorder, ask, call, chat, gateway, image_part
from tests.support.waiting import auntil
from turbofit.gateway.limits.gate import Gate
from turbofit.gateway.routing.engines import Outage


class Clock:
    """Moved by the test alone."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def outage(clock: Clock) -> Outage:
    return Outage("the inference engine ended 6 times within 10 minutes and rests", 1600.0, clock)


def test_clients_learn_why_and_for_how_long() -> None:
    clock = Clock()
    app, recorder = gateway(engines=2)
    for engine in app.engines:
        engine.succeeded()
    app.rest(outage(clock))
    for now, left in ((1000.0, "600"), (1168.5, "432"), (1599.9, "1"), (1700.0, "1")):
        clock.now = now
        reply, health = ask(app, body=chat(image_part())), ask(app, "/health")
        assert (reply.status, reply.json["error"]["code"]) == (503, "engine_resting")
        assert (health.status, health.json["status"], health.json["up"]) == (503, "resting", 0)
        for one, text in (
            (reply, reply.json["error"]["message"]),
            (health, health.json["message"]),
        ):
            assert one.headers["retry-after"] == left
            assert text == (
                "the inference engine ended 6 times within 10 minutes and rests; "
                f"the next start is in {left} s"
            )
    assert recorder.seen == []


async def test_after_the_rest_the_first_answer_brings_it_back() -> None:
    app, recorder = gateway(recorder=Recorder(), retry_seconds=0.0)
    app.engines[0].succeeded()
    app.rest(outage(Clock()))
    recorder.works = False
    async with serving(app):
        app.rest(None)
        starting = await call(app, "/health")
        recorder.works = True
        app.monitor.suspect(app.engines[0])
        await auntil(lambda: app.engines[0].up, "the engine to be back")
        health, reply = await call(app, "/health"), await call(app, body=chat())
    assert (starting.status, starting.headers["retry-after"]) == (503, "5")
    assert starting.json["status"] == "unavailable"
    assert (health.status, reply.status) == (200, 200)


async def test_who_waits_is_told_when_a_rest_begins() -> None:
    app, recorder = gateway()
    app.engines[0].gate = Gate(13)
    app.fleet.__init__(app.engines)
    held = asyncio.get_running_loop().create_future()

    async def answer(*_):
        return await held

    recorder.answer = answer
    body = chat(image_part(1792, 1344))
    calls = [asyncio.ensure_future(call(app, body=body)) for _ in range(2)]
    while not (recorder.seen and app.admission.waiting):
        await asyncio.sleep(0)
    app.rest(outage(Clock()))
    held.set_result(OSError("reset"))
    replies = await asyncio.wait_for(asyncio.gather(*calls), 120)
    assert [reply.status for reply in replies] == [503, 503]
    assert "600" in [reply.headers["retry-after"] for reply in replies]
