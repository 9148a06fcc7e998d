"""One address for several models: which model answers, what waits, and what clients are told."""

from __future__ import annotations

import asyncio
from codecs import BOM_UTF8
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests import virtual_time
from tests.support.gateway import CHAT, Answer, Recorder, Reply, call, chat, gateway, plan_for
from turbofit.core.errors import LaunchError
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http.app import Gateway
from turbofit.gateway.limits.request_limits import bounds_of
from turbofit.gateway.models import ModelsGateway, ServedModel, insist
from turbofit.gateway.routing.engines import Outage, RoutedEngine


class Site:
    """Two models behind one address; each recorder says what reached its engine."""

    def __init__(self, *names: str, wait: float = 600.0, **config: Any) -> None:
        self.config = GatewayConfig(**config)
        self.models = {name: ServedModel(name) for name in names}
        bounds = [bounds_of(plan_for()) for _ in names]
        self.app = ModelsGateway(list(self.models.values()), bounds, self.config, wait=wait)
        self.app.opened = True
        self.recorders: dict[str, Recorder] = {}
        self.model = self.models["a"]

    @property
    def wanted(self) -> list[str]:
        """The models that somebody wants, and does not have."""
        return [name for name, model in self.models.items() if model.wanted_since is not None]

    def ready(self, name: str = "a", answer: Any = None) -> Gateway:
        """Its engines are ready, as a session says so."""
        model = self.models[name]
        if model.state != "starting":
            model.begin()
        keys = self.config.api_keys
        inner, self.recorders[name] = gateway(recorder=Recorder(answer), api_keys=keys)
        for engine in inner.engines:
            engine.succeeded()
        model.open(inner)
        return inner

    async def chat(self, name: Any = "a", **more: Any) -> Reply:
        return await call(self.app, CHAT, {**chat(), "model": name}, **more)

    async def waiting(self, **more: Any) -> asyncio.Task[Reply]:
        """A request that waits for its model by now."""
        reply = asyncio.ensure_future(self.chat(**more))
        await virtual_time.settled()
        return reply

    async def page(self, path: str, **more: Any) -> Reply:
        return await call(self.app, path, **more)


async def test_the_model_of_a_request_answers_it() -> None:
    site = Site("a", "b")
    for name in site.models:
        site.ready(name)
    for name in ("b", "a"):
        assert (await site.chat(name)).status == 200
    # A byte order mark hides no model.
    raw = BOM_UTF8 + msgspec.json.encode({**chat(), "model": "b"})
    assert (await site.page(CHAT, raw=raw)).status == 200
    assert [body["model"] for body in site.recorders["a"].bodies] == ["a"]
    assert [body["model"] for body in site.recorders["b"].bodies] == ["b", "b"]
    assert all(model.in_flight == 0 for model in site.models.values())
    # A request that names none is for the only one.
    site = Site("a")
    site.ready()
    assert (await site.page("/generate", body={"prompt": "x"})).status == 200


async def test_each_name_of_a_model_starts_and_reaches_it() -> None:
    models = [ServedModel("org/a", ("a", "a-2b")), ServedModel("b")]
    app = ModelsGateway(models, [bounds_of(plan_for())] * 2, GatewayConfig(), wait=0)
    app.opened = True
    inner, recorder = gateway(names=dict.fromkeys(models[0].names, "org/a"))
    inner.engines[0].succeeded()
    models[0].begin()
    models[0].open(inner)
    for name in ("org/a", "a", "a-2b"):
        assert (await call(app, CHAT, {**chat(), "model": name})).status == 200
    assert [body["model"] for body in recorder.bodies] == ["org/a"] * 3
    cards = (await call(app, "/v1/models", method="GET")).json["data"]
    assert [(card["id"], card["root"]) for card in cards] == [
        ("org/a", "org/a"), ("a", "org/a"), ("a-2b", "org/a"), ("b", "b"),
    ]  # fmt: skip
    error = (await call(app, CHAT, {**chat(), "model": "A"})).json["error"]
    assert error["message"] == "The model 'A' does not exist; there are org/a, a, a-2b, b"


async def test_the_page_tells_what_is_waited_for_and_how_long() -> None:
    site = Site("a", "b")
    site.ready()
    site.model.start_seconds = 30.0
    about = (await site.page("/about", method="GET")).json
    assert about["notices"] == ["b is asleep"]
    assert [one["name"] for one in about["models"]] == ["a", "b"]
    site.model.detach(site.model.gateway)
    await asyncio.sleep(12)
    notices = (await site.page("/about", method="GET")).json["notices"]
    assert notices[0] == "a is starting; a start takes about 30 s, 18 s are left"


async def test_an_unknown_model_is_a_404_and_starts_nothing() -> None:
    site = Site("a", "b")
    reply = await site.chat("x")
    error = reply.json["error"]
    assert (reply.status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert error["message"] == "The model 'x' does not exist; there are a, b"
    assert (await site.chat(None)).status == 400
    assert (await site.page(CHAT, raw=b"{")).status == 400
    anthropic = await site.page("/v1/messages", body={"model": "x", "messages": []})
    assert anthropic.json["error"]["type"] == "not_found_error"
    assert site.wanted == []


async def test_requests_wait_in_order_for_a_start() -> None:
    site = Site("a")
    bodies = [{**chat(), "model": "a", "seed": seed} for seed in range(5)]
    replies = [asyncio.ensure_future(site.page(CHAT, body=body)) for body in bodies]
    await virtual_time.settled()
    assert (site.wanted, site.model.waiting) == (["a"], 5)
    await asyncio.sleep(300)
    site.ready()
    assert [reply.status for reply in await asyncio.gather(*replies)] == [200] * 5
    assert [body["seed"] for body in site.recorders["a"].bodies] == [0, 1, 2, 3, 4]


async def test_a_wait_has_an_end_and_says_when_to_come_back() -> None:
    site = Site("a", wait=60.0)
    site.model.begin()
    site.model.start_seconds = 100.0
    reply = await site.chat()
    assert (reply.status, reply.headers["retry-after"]) == (503, "40")
    assert reply.json["error"]["code"] == "model_starting"
    assert reply.json["error"]["message"] == (
        "a is starting; a start takes about 100 s, 40 s are left"
    )
    assert not site.model.waiting


async def test_503_at_once_where_nobody_is_to_wait() -> None:
    site = Site("a", wait=0.0)
    site.model.start_seconds = 25.0
    reply = await site.chat()
    assert (reply.status, reply.headers["retry-after"]) == (503, "25")
    assert site.wanted == ["a"]
    await asyncio.sleep(30)
    site.ready()
    assert (await site.chat()).status == 200
    assert site.wanted == []


async def test_so_many_may_wait() -> None:
    site = Site("a", queue_length=2)
    waiting = [await site.waiting() for _ in range(2)]
    assert (await site.chat()).status == 429
    site.ready()
    assert [(await reply).status for reply in waiting] == [200, 200]


async def test_a_client_that_leaves_waits_no_longer_and_stops_the_engine() -> None:
    site, leave = Site("a"), asyncio.Event()
    reply = await site.waiting(leave=leave)
    leave.set()
    assert (await reply).status == 0
    assert site.wanted == []
    site.ready("a", lambda *_: Answer(3600.0, b"{}"))
    leave.clear()
    reply = await site.waiting(leave=leave)
    assert site.model.in_flight == 1
    leave.set()
    await reply
    assert site.model.in_flight == 0


async def test_a_model_that_does_not_start_says_why() -> None:
    site = Site("a", "b")
    site.ready("b")
    waiting = await site.waiting()
    site.model.begin()
    site.model.fail("GPU 0 lacks 2.0 GiB", asyncio.get_running_loop().time() + 60)
    for reply in (await waiting, await site.chat()):
        assert (reply.status, reply.headers["retry-after"]) == (503, "60")
        assert reply.json["error"]["code"] == "model_unavailable"
        assert "GPU 0 lacks 2.0 GiB" in reply.json["error"]["message"]
    assert (await site.chat("b")).status == 200
    health = await site.page("/health")
    assert (health.status, health.json["status"]) == (200, "degraded")
    await asyncio.sleep(61)
    assert (await site.page("/health")).json["status"] == "healthy"
    again = await site.waiting()
    assert site.wanted == ["a"]
    site.ready()
    assert (await again).status == 200


async def test_what_comes_while_engines_end_waits_for_the_next_start() -> None:
    site = Site("a")
    inner = site.ready()
    await asyncio.sleep(30)
    assert not site.model.close_idle(31)
    assert site.model.close_idle(30)
    reply = await site.waiting()
    site.model.detach(inner)
    site.model.sleep()
    assert not reply.done()
    inner = site.ready()
    assert (await reply).status == 200
    site.model.detach(inner)
    # The ladder ends a session's engines and starts others: requests wait for those.
    assert site.model.state == "starting"
    assert not site.model.close_idle(0)


async def test_idle_counts_from_the_last_request_and_no_page_counts() -> None:
    site = Site("a")
    site.ready()
    await asyncio.sleep(10)
    await site.chat()
    await asyncio.sleep(4)
    for path in ("/health", "/metrics", "/v1/models"):
        assert (await site.page(path)).status == 200
    assert 4 <= site.model.idle < 5


async def test_pages_say_where_each_model_stands() -> None:
    site = Site("a", "b")
    site.models["b"].start_seconds = 12.3
    engine: RoutedEngine = site.ready().engines[0]
    cards = (await site.page("/v1/models")).json["data"]
    assert [(card["id"], card["turbofit"]["state"]) for card in cards] == [
        ("a", "ready"), ("b", "asleep"),
    ]  # fmt: skip
    assert cards[1]["turbofit"]["start_seconds"] == 12.3
    other = (await site.page("/anthropic/v1/models")).json
    assert (other["first_id"], other["last_id"]) == ("a", "b")
    assert (await site.page("/health")).json["status"] == "healthy"
    text = (await site.page("/metrics")).body.decode()
    for line in (
        'turbofit_model_ready{model="a"} 1\n', 'turbofit_model_ready{model="b"} 0\n',
        'turbofit_gateway_engine_up{model="a",engine="0"} 1',
    ):  # fmt: skip
        assert line in text
    assert text.count("# TYPE turbofit_gateway_requests_total counter") == 1
    engine.up = False  # it does not answer
    assert (await site.page("/health")).json["models"]["a"]["state"] == "unavailable"
    own = site.models["a"].gateway
    own.rest(Outage("the engine ended 6 times and rests", 1600.0, lambda: 1000.0))
    alone, facts = own._health(None)[0], (await site.page("/health")).json["models"]["a"]
    assert (facts["state"], facts["message"]) == (alone["status"], alone["message"])
    assert facts["state"] == "resting"
    site.app.opened = False
    assert (await site.page("/health")).status == 503


async def test_strangers_learn_nothing_and_wake_nobody() -> None:
    site = Site("a", api_keys=("k",))
    for reply in (await site.chat(), await site.page("/v1/models"), await site.page("/sleep")):
        assert reply.status == 401
    assert site.wanted == []
    health = await site.page("/health")
    assert (health.status, health.json) == (200, {"status": "healthy", "models": 1, "up": 1})
    key = {"headers": {"authorization": "Bearer k"}}
    assert "a" in (await site.page("/health", **key)).json["models"]
    assert (await site.page("/sleep", **key)).status == 403
    site.ready()
    assert (await site.chat(**key)).status == 200
    assert b'model="a",engine="0"' in (await site.page("/metrics", **key)).body


async def test_bodies_are_counted_once_and_nobody_waits_for_a_server_that_ends() -> None:
    site = Site("a")
    waiting = await site.waiting()
    assert site.app._bodies.in_memory >= len(msgspec.json.encode({**chat(), "model": "a"}))
    site.app.end()
    assert (await waiting).json["error"]["code"] == "ending"
    assert (await site.chat()).status == 503
    assert site.app._bodies.in_memory == 0


async def test_a_front_says_whose_a_request_is() -> None:
    """Else all clients of a front were one, who would have one client's room."""
    site = Site("a", front_keys=("front",))

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        await site.app({**scope, "turbofit.connection": None}, receive, send)

    headers = {"authorization": "Bearer front", "x-turbofit-client-key": "alice"}
    body = {**chat(), "model": "a"}
    waiting = asyncio.ensure_future(call(behind, CHAT, body, headers=headers))
    await virtual_time.settled()
    assert list(site.app._bodies._held_bytes) == ["alice"]
    waiting.cancel()


def test_a_loop_that_hangs_is_not_waited_for_without_end() -> None:
    waited = []

    def call(_ask: Callable[[Any], object], seconds: float = 10.0) -> None:
        waited.append(seconds)
        assert sum(waited) <= 60, "whoever waits so long hears no signal"
        raise LaunchError("the gateway did not answer", hint="try again")

    front: Any = SimpleNamespace(alive=True, call=call)
    with pytest.raises(LaunchError, match="did not answer"):
        insist(front, lambda _: None)
    assert sum(waited) == 60
