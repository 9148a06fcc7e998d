"""What becomes of the requests of an engine that is given up, or where nothing listens."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from tests.gateway.routing.dying_engines import metric
from tests.support.gateway import Answer, Recorder, call, chat, gateway
from tests.support.waiting import HANG, auntil
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.routing.engines import RoutedEngine
from turbofit.gateway.routing.health import Monitor
from turbofit.gateway.upstream import Unreachable


async def test_who_is_still_connecting_to_an_engine_that_has_ended_goes_to_another() -> None:
    """It was never sent: no engine died of it, though the connections fail one by one."""
    refused = [asyncio.Event(), asyncio.Event()]
    connecting = iter(refused)

    async def answer(engine, path, body):
        if engine.index == 0:
            await next(connecting).wait()
            raise Unreachable("refused")
        return Answer(b"{}")

    app, _ = gateway(engines=3, recorder=Recorder(answer))
    for engine in app.engines:
        engine.succeeded()
    app.engines[0].share = 1000.0  # the least busy one, whatever it has
    both = [
        asyncio.ensure_future(call(app, body=chat({"type": "text", "text": text})))
        for text in ("one", "two")
    ]
    await auntil(lambda: app.engines[0].outstanding == 2, "both to connect")
    for one, event in zip(both, refused, strict=True):
        event.set()
        await asyncio.wait((one,), timeout=HANG)
    replies = [(await one).status for one in both]
    assert (replies, app.deny_list.suspected) == ([200, 200], 0)
    assert metric(await call(app, "/metrics"), "retried_total") == 0
    assert [(one.up, one.outstanding) for one in app.engines] == [(False, 0), (True, 0), (True, 0)]


async def test_an_answer_of_the_process_that_died_meanwhile_brings_nothing_back() -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def probe(_: RoutedEngine) -> bool:
        asked.set()
        await answer.wait()
        return True

    engine = RoutedEngine(0, "http://engine")
    monitor = Monitor([engine], SimpleNamespace(probe=probe), GatewayConfig(), lambda: None)
    monitor.start()
    await asyncio.wait_for(asked.wait(), HANG)
    engine.note_death()
    answer.set()
    await auntil(lambda: not monitor._asking, "the answer")
    before = engine.answered
    await asyncio.sleep(0)
    await monitor.stop()
    assert before is False
