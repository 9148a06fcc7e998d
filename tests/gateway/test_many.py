"""What is done engine by engine, with very many of them."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

from tests import virtual_time
from tests.support.gateway import Recorder, ask, call, chat, plan_for
from tests.waiting import auntil
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http.app import Gateway
from turbofit.gateway.limits.request_limits import bounds_of
from turbofit.gateway.routing.engines import RoutedEngine
from turbofit.gateway.routing.health import Monitor


def many(recorder: Recorder) -> tuple[Gateway, Recorder]:
    urls = [f"http://e{number}.invalid:1" for number in range(100)]
    return Gateway(bounds_of(plan_for()), urls, GatewayConfig(), upstream=recorder), recorder


def engines(count: int) -> list[RoutedEngine]:
    return [RoutedEngine(number, "http://x") for number in range(count)]


async def test_not_all_are_asked_at_once_and_all_are_asked() -> None:
    found, asking, most, probed = engines(700), set(), 0, []

    async def probe(engine):
        asking.add(engine)
        probed.append(engine)
        nonlocal most
        most = max(most, len(asking))
        await asyncio.sleep(0.02)
        asking.discard(engine)
        return True

    monitor = Monitor(found, probe, lambda: None)
    monitor.start()
    await auntil(lambda: len(probed) >= len(found), "all to be asked")
    await monitor.stop()
    assert (most, len(probed), len(set(probed))) == (256, 700, 700)


async def test_dead_engines_keep_nobody_waiting() -> None:
    found, probed = engines(1000), []
    for engine in found[:600]:
        engine.up = False

    async def probe(engine):
        probed.append(engine.index)
        if engine.index < 600:
            await asyncio.Event().wait()
        return True

    monitor = Monitor(found, probe, lambda: None, retry=0.0, patience=0.05)
    monitor.start()
    await auntil(lambda: len(set(probed)) == 1000, "all to be asked")
    await monitor.stop()
    assert set(probed) == set(range(1000))
    assert {index for index in probed[:512] if index >= 600} == set(range(600, 856))


def test_those_which_began_together_are_not_asked_together() -> None:
    found, now = engines(1000), time.monotonic()
    monitor = Monitor(found, lambda _: asyncio.sleep(0), lambda: None, idle=60.0)
    for engine in found:
        engine.suspect, engine.last_success, engine.last_check = False, now, now - 100
    due = [sum(monitor._due(e, now + at) for e in found) for at in (44.9, 48.9, 52.6, 56.3, 60.1)]
    assert due[0] == 0
    assert due[-1] == 1000
    assert all(200 < later - before < 300 for before, later in pairwise(due))
    # An engine alone is asked when it was said.
    assert not monitor._due(found[0], now + 59.9)


def test_few_pages_are_read_at_once_and_none_is_waited_for_too_long() -> None:
    app, recorder = many(Recorder())
    reading = most = 0

    async def page(engine, path, seconds):
        nonlocal reading, most
        reading += 1
        most = max(most, reading)
        try:
            await asyncio.sleep(60 if engine.index == 7 else 0.01)
        finally:
            reading -= 1
        return f"# TYPE a gauge\na {engine.index}\n"

    recorder.page = page
    lines = virtual_time.run(call(app, "/metrics")).body.decode().splitlines()
    assert most == 32
    assert sum(line.startswith("a{") for line in lines) == 99
    assert 'a{engine="99"} 99' in lines
    assert 'turbofit_gateway_engine_up{engine="7"} 1' in lines


def test_a_gateway_without_a_network_gives_up_soon() -> None:
    recorder = Recorder()
    recorder.down = set(range(100))
    app, _ = many(recorder)
    reply = ask(app, body=chat())
    assert (reply.status, reply.json["error"]["code"]) == (503, "engine_unavailable")
    assert sum(not engine.up for engine in app.engines) == 16
