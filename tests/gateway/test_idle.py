"""An address whose engines sleep: what waits for their start, and what clients are told."""

from __future__ import annotations

import asyncio
from codecs import BOM_UTF8
from typing import Any

import msgspec

from tests import virtual_time
from tests.support.gateway import CHAT, Answer, Recorder, Reply, call, chat, gateway, plan_for
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http.app import Gateway
from turbofit.gateway.idle import IdleGateway
from turbofit.gateway.routing.engines import Outage, RoutedEngine
from turbofit.serving.plan_gateway import bounds_of

NAMES = {"org/a": "org/a", "a": "org/a", "a-2b": "org/a"}


class Site:
    """A model behind its address; the recorder says what reached its engine."""

    def __init__(self, *, wait: float = 600.0, **config: Any) -> None:
        self.config = GatewayConfig(names=NAMES, **config)
        self.app = IdleGateway(bounds_of(plan_for()), self.config, wait=wait)
        self.app.opened = True
        self.recorder = Recorder()

    def ready(self, answer: Any = None) -> Gateway:
        """Its engines are ready, as a run says so."""
        if self.app.state != "starting":
            self.app.begin()
        keys = self.config.api_key
        inner, self.recorder = gateway(recorder=Recorder(answer), api_key=keys, names=NAMES)
        for engine in inner.engines:
            engine.succeeded()
        self.app.open(inner)
        return inner

    async def chat(self, name: Any = "a", **more: Any) -> Reply:
        return await call(self.app, CHAT, {**chat(), "model": name}, **more)

    async def waiting(self, **more: Any) -> asyncio.Task[Reply]:
        """A request that waits for the start by now."""
        reply = asyncio.ensure_future(self.chat(**more))
        await virtual_time.settled()
        return reply

    async def page(self, path: str, **more: Any) -> Reply:
        return await call(self.app, path, **more)


async def test_each_name_reaches_it_and_so_does_a_request_without_one() -> None:
    site = Site()
    site.ready()
    for name in NAMES:
        assert (await site.chat(name)).status == 200
    # A byte order mark hides no model.
    raw = BOM_UTF8 + msgspec.json.encode({**chat(), "model": "a"})
    assert (await site.page(CHAT, raw=raw)).status == 200
    assert [body["model"] for body in site.recorder.bodies] == ["org/a"] * 4
    assert site.app.in_flight == 0
    assert (await site.page("/generate", body={"prompt": "x"})).status == 200
    cards = (await site.page("/v1/models", method="GET")).json["data"]
    assert [(card["id"], card["root"]) for card in cards] == list(NAMES.items())


async def test_the_page_tells_what_is_waited_for() -> None:
    site = Site()
    site.ready()
    about = (await site.page("/about", method="GET")).json
    assert about["notices"] == []
    site.app.detach()
    about = (await site.page("/about", method="GET")).json
    assert [one["name"] for one in about["models"]] == ["org/a"]
    assert about["notices"] == ["org/a is starting"]


async def test_an_unknown_model_is_a_404_and_starts_nothing() -> None:
    site = Site()
    reply = await site.chat("x")
    error = reply.json["error"]
    assert (reply.status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "org/a, a, a-2b" in error["message"]
    assert (await site.page(CHAT, raw=b"{")).status == 400
    anthropic = await site.page("/v1/messages", body={"model": "x", "messages": []})
    assert (anthropic.json["error"]["type"], site.app.waiting) == ("not_found_error", 0)


async def test_requests_wait_in_order_for_a_start() -> None:
    site = Site()
    bodies = [{**chat(), "model": "a", "seed": seed} for seed in range(5)]
    replies = [asyncio.ensure_future(site.page(CHAT, body=body)) for body in bodies]
    await virtual_time.settled()
    assert site.app.waiting == 5
    await asyncio.sleep(300)
    site.ready()
    assert [reply.status for reply in await asyncio.gather(*replies)] == [200] * 5
    assert [body["seed"] for body in site.recorder.bodies] == [0, 1, 2, 3, 4]


async def test_a_wait_has_an_end_and_says_when_to_come_back() -> None:
    site = Site(wait=60.0)
    site.app.begin()
    reply = await site.chat()
    assert (reply.status, reply.headers["retry-after"]) == (503, "10")
    assert reply.json["error"]["code"] == "model_starting"
    assert not site.app.waiting


async def test_a_client_that_leaves_waits_no_longer_and_stops_the_engine() -> None:
    site, leave = Site(), asyncio.Event()
    reply = await site.waiting(leave=leave)
    leave.set()
    assert ((await reply).status, site.app.waiting) == (0, 0)
    site.ready(lambda *_: Answer(3600.0, b"{}"))
    leave.clear()
    reply = await site.waiting(leave=leave)
    assert site.app.in_flight == 1
    leave.set()
    await reply
    assert site.app.in_flight == 0


async def test_a_model_that_does_not_start_says_why_to_who_has_a_key() -> None:
    site, key = Site(api_key=("k",)), {"headers": {"authorization": "Bearer k"}}
    waiting = await site.waiting(**key)
    site.app.begin()
    site.app.fail("GPU 0 lacks 2.0 GiB", 60)
    for reply in (await waiting, await site.chat(**key)):
        assert (reply.status, reply.headers["retry-after"]) == (503, "60")
        assert reply.json["error"]["code"] == "model_unavailable"
        assert "GPU 0 lacks 2.0 GiB" in reply.json["error"]["message"]
    health = await site.page("/health")
    assert (health.status, health.json["status"]) == (503, "unavailable")
    assert "lacks" not in health.body.decode()
    await asyncio.sleep(61)
    assert (await site.page("/health")).json["status"] == "healthy"
    again = await site.waiting(**key)
    assert site.app.rested
    site.ready()
    assert (await again).status == 200


async def test_what_comes_while_engines_end_waits_for_the_next_start() -> None:
    site = Site()
    site.ready()
    await asyncio.sleep(30)
    assert not site.app.close_idle(31)
    assert site.app.close_idle(30)
    reply = await site.waiting()
    site.app.detach()
    site.app.sleep()
    assert not reply.done()
    site.ready()
    assert (await reply).status == 200
    site.app.detach()
    # The ladder ends a run's engines and starts others: requests wait for those.
    assert site.app.state == "starting"
    assert not site.app.close_idle(0)


async def test_idle_counts_from_the_last_request_and_no_page_counts() -> None:
    site = Site()
    site.ready()
    await asyncio.sleep(10)
    await site.chat()
    await asyncio.sleep(4)
    for path in ("/health", "/metrics", "/v1/models"):
        assert (await site.page(path)).status == 200
    assert 4 <= site.app.idle < 5


async def test_pages_say_where_it_stands() -> None:
    site = Site()
    site.app.opened = False
    starting = await site.page("/health")
    assert (starting.status, starting.json["status"]) == (503, "starting")
    site.app.opened = True
    asleep = await site.page("/health")
    assert (asleep.status, asleep.json["status"], asleep.json["state"]) == (
        200,
        "healthy",
        "asleep",
    )
    assert "up" not in asleep.json
    assert 'turbofit_model_ready{model="org/a"} 0\n' in (await site.page("/metrics")).body.decode()
    inner = site.ready()
    engine: RoutedEngine = inner.engines[0]
    text = (await site.page("/metrics")).body.decode()
    for line in (
        'turbofit_model_ready{model="org/a"} 1\n',
        'turbofit_gateway_engine_up{model="org/a",engine="0"} 1',
    ):
        assert line in text
    ready = (await site.page("/health")).json
    assert (ready["status"], ready["state"], ready["up"]) == ("healthy", "ready", 1)
    engine.up = False  # it does not answer
    assert (await site.page("/health")).json["state"] == "unavailable"
    inner.rest(Outage("the engine ended 6 times and rests", 1600.0, lambda: 1000.0))
    alone, page = inner._health(None)[0], (await site.page("/health")).json
    assert (page["state"], page["message"]) == (alone["status"], alone["message"])
    assert page["state"] == "resting"


async def test_strangers_learn_nothing_and_wake_nobody() -> None:
    site = Site(api_key=("k",))
    for reply in (await site.chat(), await site.page("/v1/models"), await site.page("/sleep")):
        assert reply.status == 401
    assert site.app.waiting == 0
    assert "org/a" not in (await site.page("/health")).body.decode()
    key = {"headers": {"authorization": "Bearer k"}}
    assert (await site.page("/sleep", **key)).status == 403
    site.ready()
    assert (await site.chat(**key)).status == 200
    assert b'model="org/a",engine="0"' in (await site.page("/metrics", **key)).body


async def test_bodies_are_counted_once_and_nobody_waits_for_a_server_that_ends() -> None:
    site = Site()
    waiting = await site.waiting()
    assert site.app._bodies.in_memory >= len(msgspec.json.encode({**chat(), "model": "a"}))
    site.app.end()
    assert (await waiting).json["error"]["code"] == "ending"
    assert (await site.chat()).status == 503
    assert site.app._bodies.in_memory == 0
