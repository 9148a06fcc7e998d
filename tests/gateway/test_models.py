"""One address for several models: which model answers, what waits, and what clients are told."""

from __future__ import annotations

import asyncio
from codecs import BOM_UTF8
from collections.abc import Callable
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
from turbofit.gateway.routing.engines import RoutedEngine


class Site:
    """Two models behind one address; each recorder says what reached its engine."""

    def __init__(self, *names: str, wait: float = 600.0, **config: Any) -> None:
        self.config = GatewayConfig(**config)
        self.models = {name: ServedModel(name) for name in names}
        bounds = [bounds_of(plan_for()) for _ in names]
        self.app = ModelsGateway(list(self.models.values()), bounds, self.config, wait=wait)
        self.app.opened = True
        self.recorders: dict[str, Recorder] = {}

    @property
    def wanted(self) -> list[str]:
        """The models that somebody wants, and does not have."""
        return [name for name, model in self.models.items() if model.wanted_since is not None]

    def ready(self, name: str, answer: Any = None) -> Gateway:
        """Its engines are ready, as a session says so."""
        model = self.models[name]
        if model.state != "starting":
            model.begin()
        inner, self.recorders[name] = gateway(
            recorder=Recorder(answer), api_keys=self.config.api_keys
        )
        for engine in inner.engines:
            engine.succeeded()
        model.open(inner)
        return inner

    async def chat(self, name: Any, **more: Any) -> Reply:
        return await call(self.app, CHAT, {**chat(), "model": name}, **more)


async def test_the_model_of_a_request_answers_it() -> None:
    site = Site("a", "b")
    site.ready("a"), site.ready("b")
    for name in ("b", "a", "b"):
        assert (await site.chat(name)).status == 200
    assert [body["model"] for body in site.recorders["a"].bodies] == ["a"]
    assert [body["model"] for body in site.recorders["b"].bodies] == ["b", "b"]
    assert all(model.in_flight == 0 for model in site.models.values())


async def test_each_name_of_a_model_starts_and_reaches_it() -> None:
    models = [ServedModel("org/a", ("a", "a-2b")), ServedModel("b")]
    bounds = [bounds_of(plan_for()) for _ in models]
    app = ModelsGateway(models, bounds, GatewayConfig(), wait=0)
    app.opened = True
    inner, recorder = gateway(names=dict.fromkeys(models[0].names, "org/a"))
    for engine in inner.engines:
        engine.succeeded()
    models[0].begin()
    models[0].open(inner)
    for name in ("org/a", "a", "a-2b"):
        assert (await call(app, CHAT, {**chat(), "model": name})).status == 200
    assert [body["model"] for body in recorder.bodies] == ["org/a"] * 3
    cards = (await call(app, "/v1/models", method="GET")).json["data"]
    assert [card["id"] for card in cards] == ["org/a", "a", "a-2b", "b"]
    assert [card["root"] for card in cards] == ["org/a", "org/a", "org/a", "b"]
    error = (await call(app, CHAT, {**chat(), "model": "A"})).json["error"]
    assert error["message"] == "The model 'A' does not exist; there are org/a, a, a-2b, b"


async def test_a_byte_order_mark_hides_no_model() -> None:
    site = Site("a", "b")
    site.ready("b")
    raw = BOM_UTF8 + msgspec.json.encode({**chat(), "model": "b"})
    assert (await call(site.app, CHAT, raw=raw)).status == 200


async def test_an_unknown_model_is_a_404_and_starts_nothing() -> None:
    site = Site("a", "b")
    reply = await site.chat("x")
    error = reply.json["error"]
    assert (reply.status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert error["message"] == "The model 'x' does not exist; there are a, b"
    assert (await site.chat(None)).status == 400
    assert (await call(site.app, CHAT, raw=b"{")).status == 400
    anthropic = await call(site.app, "/v1/messages", {"model": "x", "messages": []})
    assert anthropic.json["error"]["type"] == "not_found_error"
    assert site.wanted == []


async def test_a_bug_of_ours_is_a_500_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_body: bytes) -> None:
        raise RuntimeError("a secret detail")

    site, contexts = Site("a"), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: contexts.append(context))
    monkeypatch.setattr(site.app, "_find", broken)
    reply = await site.chat("a")
    assert reply.status == 500
    assert b"secret" not in reply.body
    assert isinstance(contexts[0]["exception"], RuntimeError)


async def test_a_request_that_names_no_model_is_for_the_only_one() -> None:
    site = Site("a")
    site.ready("a")
    assert (await call(site.app, "/generate", {"prompt": "x"})).status == 200


async def test_requests_wait_in_order_for_a_start() -> None:
    site = Site("a")
    replies = [
        asyncio.ensure_future(call(site.app, CHAT, {**chat(), "model": "a", "seed": seed}))
        for seed in range(5)
    ]
    await virtual_time.settled()
    assert site.wanted == ["a"]
    assert len(site.models["a"].waiting) == 5
    await asyncio.sleep(300)
    site.ready("a")
    assert [reply.status for reply in await asyncio.gather(*replies)] == [200] * 5
    assert [body["seed"] for body in site.recorders["a"].bodies] == [0, 1, 2, 3, 4]


async def test_a_wait_has_an_end_and_says_when_to_come_back() -> None:
    site = Site("a", wait=60.0)
    model = site.models["a"]
    model.begin()
    model.start_seconds = 100.0
    reply = await site.chat("a")
    assert (reply.status, reply.headers["retry-after"]) == (503, "40")
    assert reply.json["error"]["code"] == "model_starting"
    assert reply.json["error"]["message"] == "a is starting; a start takes about 100 s"
    assert not model.waiting


async def test_503_at_once_where_nobody_is_to_wait() -> None:
    site = Site("a", wait=0.0)
    model = site.models["a"]
    model.start_seconds = 25.0
    reply = await site.chat("a")
    assert (reply.status, reply.headers["retry-after"]) == (503, "25")
    assert site.wanted == ["a"]
    await asyncio.sleep(30)
    site.ready("a")
    assert (await site.chat("a")).status == 200
    assert site.wanted == []


async def test_so_many_may_wait() -> None:
    site = Site("a", queue_length=2)
    waiting = [asyncio.ensure_future(site.chat("a")) for _ in range(2)]
    await virtual_time.settled()
    assert (await site.chat("a")).status == 429
    site.ready("a")
    assert [(await reply).status for reply in waiting] == [200, 200]


async def test_a_client_that_leaves_waits_no_longer() -> None:
    site, leave = Site("a"), asyncio.Event()
    reply = asyncio.ensure_future(site.chat("a", leave=leave))
    await virtual_time.settled()
    leave.set()
    assert (await reply).status == 0
    assert site.models["a"].wanted_since is None


async def test_a_client_that_leaves_while_it_is_answered_stops_the_engine() -> None:
    site, leave = Site("a"), asyncio.Event()
    site.ready("a", lambda *_: Answer(3600.0, b"{}"))
    reply = asyncio.ensure_future(site.chat("a", leave=leave))
    await asyncio.sleep(1)
    assert site.models["a"].in_flight == 1
    leave.set()
    await reply
    assert site.models["a"].in_flight == 0


async def test_a_model_that_does_not_start_says_why() -> None:
    site = Site("a", "b")
    site.ready("b")
    model = site.models["a"]
    waiting = asyncio.ensure_future(site.chat("a"))
    await virtual_time.settled()
    model.begin()
    loop = asyncio.get_running_loop()
    model.fail("GPU 0 lacks 2.0 GiB", loop.time() + 60)
    for reply in (await waiting, await site.chat("a")):
        assert (reply.status, reply.headers["retry-after"]) == (503, "60")
        assert reply.json["error"]["code"] == "model_unavailable"
        assert "GPU 0 lacks 2.0 GiB" in reply.json["error"]["message"]
    assert (await site.chat("b")).status == 200
    health = await call(site.app, "/health")
    assert (health.status, health.json["status"]) == (200, "degraded")
    await asyncio.sleep(61)
    assert (await call(site.app, "/health")).json["status"] == "healthy"
    again = asyncio.ensure_future(site.chat("a"))
    await virtual_time.settled()
    assert model.wanted_since is not None
    site.ready("a")
    assert (await again).status == 200


async def test_what_comes_while_engines_end_waits_for_the_next_start() -> None:
    site = Site("a")
    inner = site.ready("a")
    await asyncio.sleep(30)
    model = site.models["a"]
    assert not model.close_idle(31)
    assert model.close_idle(30)
    reply = asyncio.ensure_future(site.chat("a"))
    await virtual_time.settled()
    model.detach(inner)
    model.sleep()
    assert not reply.done()
    site.ready("a")
    assert (await reply).status == 200


async def test_idle_counts_from_the_last_request_and_no_page_counts() -> None:
    site = Site("a")
    site.ready("a")
    await asyncio.sleep(10)
    await site.chat("a")
    await asyncio.sleep(4)
    for path in ("/health", "/metrics", "/v1/models"):
        assert (await call(site.app, path)).status == 200
    assert 4 <= site.models["a"].idle < 5


async def test_engines_that_are_started_again_are_no_idle_ones() -> None:
    """The ladder ends a session's engines and starts others: requests wait for those."""
    site = Site("a")
    inner = site.ready("a")
    model = site.models["a"]
    model.detach(inner)
    assert model.state == "starting"
    assert not model.close_idle(0)


async def test_pages_say_where_each_model_stands() -> None:
    site = Site("a", "b")
    site.models["b"].start_seconds = 12.3
    site.ready("a")
    listed = (await call(site.app, "/v1/models")).json
    assert [card["id"] for card in listed["data"]] == ["a", "b"]
    assert [card["turbofit"]["state"] for card in listed["data"]] == ["ready", "asleep"]
    assert listed["data"][1]["turbofit"]["start_seconds"] == 12.3
    other = (await call(site.app, "/anthropic/v1/models")).json
    assert (other["first_id"], other["last_id"]) == ("a", "b")
    assert (await call(site.app, "/health")).json["status"] == "healthy"
    text = (await call(site.app, "/metrics")).body.decode()
    assert 'turbofit_model_ready{model="a"} 1\n' in text
    assert 'turbofit_model_ready{model="b"} 0\n' in text
    assert 'turbofit_gateway_engine_up{model="a",engine="0"} 1' in text
    assert text.count("# TYPE turbofit_gateway_requests_total counter") == 1
    site.app.opened = False
    assert (await call(site.app, "/health")).status == 503


async def test_strangers_learn_nothing_and_wake_nobody() -> None:
    site = Site("a", api_keys=("k",))
    for reply in (
        await site.chat("a"), await call(site.app, "/v1/models"),
        await call(site.app, "/sleep"),
    ):  # fmt: skip
        assert reply.status == 401
    assert site.wanted == []
    health = await call(site.app, "/health")
    assert (health.status, health.json) == (200, {"status": "healthy", "models": 1, "up": 1})
    headers = {"authorization": "Bearer k"}
    assert "a" in (await call(site.app, "/health", headers=headers)).json["models"]
    assert (await call(site.app, "/sleep", headers=headers)).status == 403
    site.ready("a")
    assert (await site.chat("a", headers=headers)).status == 200
    metrics = await call(site.app, "/metrics", headers=headers)
    assert 'model="a",engine="0"' in metrics.body.decode()


async def test_nobody_waits_for_a_server_that_ends() -> None:
    site = Site("a")
    waiting = asyncio.ensure_future(site.chat("a"))
    await virtual_time.settled()
    site.app.end()
    assert (await waiting).json["error"]["code"] == "ending"
    assert (await site.chat("a")).status == 503


async def test_bodies_are_counted_once_and_given_back() -> None:
    site = Site("a")
    waiting = asyncio.ensure_future(site.chat("a"))
    await virtual_time.settled()
    size = len(msgspec.json.encode({**chat(), "model": "a"}))
    assert site.app._bodies.in_memory >= size
    site.ready("a")
    await waiting
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


async def test_an_engine_that_does_not_answer_is_no_healthy_model() -> None:
    site = Site("a")
    inner = site.ready("a")
    engine: RoutedEngine = inner.engines[0]
    engine.up = False
    health = await call(site.app, "/health")
    assert (health.status, health.json["models"]["a"]["state"]) == (503, "unavailable")


class Hanging:
    """An address whose loop never comes to what it is asked."""

    alive = True
    seconds = 0.0

    def call(self, _ask: Callable[[Any], object], seconds: float = 10.0) -> None:
        self.seconds += seconds
        assert self.seconds <= 60, "whoever waits so long hears no signal"
        raise LaunchError("the gateway did not answer", hint="try again")


def test_a_loop_that_hangs_is_not_waited_for_without_end() -> None:
    front: Any = Hanging()
    with pytest.raises(LaunchError, match="did not answer"):
        insist(front, lambda _: None)
    assert front.seconds == 60
