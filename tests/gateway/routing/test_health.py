"""When an engine counts as gone, slow or back, by its probes and by what it answers."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from tests import virtual_time
from tests.gateway.routing.test_request_forwarder import serving
from tests.support.gateway import (
    CHAT,
    DONE,
    EVENT,
    Answer,
    Recorder,
    call,
    chat,
    gateway,
    stream,
)
from tests.support.waiting import auntil
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.routing.engines import (
    RoutedEngine,
)
from turbofit.gateway.routing.health import Monitor, healthy

#: Prometheus' client writes large numbers so, quotes what a label holds, and NaN for nothing.
PAGE = """\
lmdeploy:num_requests_running{model_name="m"} NaN
lmdeploy:prompt_tokens_total{model_name="a\\"} b"} 1.23456789e+08
lmdeploy:prompt_tokens_total{model_name="m"} %d
lmdeploy:generation_tokens_total{model_name="m"} %d
"""


@pytest.mark.parametrize("moves", [True, False])
async def test_an_engine_whose_tokens_still_count_is_slow_and_not_taken_out(moves) -> None:
    """Its probes fail, and nothing comes; its page tells of progress, or does not."""
    app, recorder = gateway(
        engines=1, recorder=Recorder(lambda *_: stream(3000.0, EVENT, DONE)),
        stall_seconds=100.0, probe_seconds=1.0,
    )  # fmt: skip
    count = iter(range(1, 10_000))

    async def page(*_):
        return PAGE % (next(count) if moves else 1, 1)

    recorder.page = page
    app.engines[0].succeeded()
    async with serving(app):
        recorder.works = False
        reply, up = await call(app, body=chat(stream=True)), app.engines[0].up
    assert (reply.status, up) == ((200, True) if moves else (503, False))


@asynccontextmanager
async def watching(engines, probe, **keywords):
    """A monitor of these engines, and a list with an item for each change that it told."""
    changed = []
    times = {"stall_seconds": 60.0, "retry_seconds": 0.0, "probe_seconds": 0.05, **keywords}
    upstream = SimpleNamespace(probe=probe)
    monitor = Monitor(engines, upstream, GatewayConfig(**times), lambda: changed.append(1))
    monitor.start()
    yield monitor, changed
    await monitor.stop()


async def test_three_failed_probes_take_an_engine_out_and_one_success_brings_it_back() -> None:
    """What a probe raises, a cancellation of something else too, does not end the watch."""
    answers = [OSError(), asyncio.CancelledError(), False, False, False, False, True]
    all_engines, states = [RoutedEngine(0, "http://engine")], []

    async def probe(engine):
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        states.append((engine.up, healthy(all_engines)))
        return answer

    async with watching(all_engines, probe) as (_, changed):
        await auntil(lambda: not answers, "five questions")
        await virtual_time.settled()
    assert states == [(up, False) for up in (True, True, True, False, False)]
    assert (all_engines[0].up, healthy(all_engines), len(changed)) == (True, True, 2)


async def test_an_engine_that_owes_answers_but_is_silent_is_given_up() -> None:
    """The port lives, nothing ever comes: what waits for it must end."""
    recorder = Recorder(lambda *_: stream(b"data: 1\n\n", 600.0))
    recorder.works = False
    app, _ = gateway(recorder=recorder, idle_seconds=1e6)
    app.engines[0].succeeded()
    async with serving(app):
        streaming = asyncio.ensure_future(call(app, body=chat(stream=True)))
        await virtual_time.settled()
        recorder.answer = lambda *_: Answer(600.0)
        silent = await call(app, body=chat())
        dead, health = await call(app, body=chat()), await call(app, "/health")
        recorder.works = True
        await auntil(lambda: app.engines[0].up, "the engine to be back")
        back = await call(app, "/health")
    assert (await streaming).status == 200
    assert b'"engine_died"' in (await streaming).body
    assert [reply.status for reply in (silent, dead, health, back)] == [503, 503, 503, 200]
    assert dead.headers["retry-after"] == "5"


async def test_what_its_supervisor_doubts_gets_nothing_new_and_clients_hear_when() -> None:
    """An engine that gives no sign of life is ended in 20 s; its last start took 12."""
    recorder = Recorder(lambda *_: Answer(600.0))
    app, _ = gateway(recorder=recorder, hung_seconds=math.inf, idle_seconds=1e6)
    (engine,) = app.engines
    engine.succeeded()
    engine.start_seconds, recorder.works = 12.0, False
    async with serving(app):
        silent = asyncio.ensure_future(call(app, body=chat()))
        await asyncio.sleep(5.0)
        assert (engine.owes, engine.asked_at) == (True, time.monotonic() - 5.0)
        assert engine.silent_since == engine.asked_at
        app.doubt(0, time.monotonic() + 20.0)
        told = await call(app, body=chat())
        assert (told.status, told.headers["retry-after"]) == (503, "34")
        await asyncio.sleep(10.0)
        assert (await call(app, "/health")).headers["retry-after"] == "24"
        assert not silent.done()  # it ends with its engine
        recorder.works, recorder.answer = True, lambda *_: Answer(b"{}")
        await auntil(lambda: engine.up, "it to answer")
        assert (engine.ends_at, (await call(app, body=chat())).status) == (math.inf, 200)
        silent.cancel()


async def test_failing_answers_make_the_gateway_ask() -> None:
    """After an out-of-memory of the PyTorch engine every request is a 503 and its health is 200."""
    app, recorder = gateway(
        recorder=Recorder(lambda *_: Answer(b"{}", status=503)), retry_seconds=0.0
    )
    app.engines[0].succeeded()
    recorder.works = False
    async with serving(app):
        assert (await call(app, CHAT, chat())).status == 503
        await auntil(lambda: not app.engines[0].up, "the engine to be given up")
        assert (await call(app, "/health")).status == 503
    assert recorder.probes >= 3
