"""Several servers at one address, on real sockets: which one answers, and with which key."""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack
from typing import Any

import pytest

from tests.gateway.test_server import Engine, asked, config
from tests.support.gateway import chat, plan_for
from tests.support.waiting import until
from turbofit.core.messages import PRETEND_WORDS
from turbofit.gateway import server
from turbofit.gateway.front import ModelsGateway, model_servers
from turbofit.gateway.server import GatewayThread
from turbofit.serving.plan_gateway import make_gateway


class World:
    """Two servers with models and keys of their own, and the address before them."""

    def __init__(self, stack: ExitStack, up: int = 2, **public: Any) -> None:
        self.engines, self.servers, self.records = {}, {}, {}
        for name in ("a", "b"):
            engine = self.engines[name] = stack.enter_context(Engine())
            records = self.records[name] = []
            names = {"org/a": "org/a"} if name == "a" else {"mine": "org/b"}
            settings = config(front_keys=(f"key-of-{name}",), names=names, pretend=name == "b")
            app = make_gateway(plan_for(), [engine.url], settings, log=records.append)
            self.servers[name] = stack.enter_context(GatewayThread(app))
        texts = [f"org/a={self.servers['a'].url}", f"mine={self.servers['b'].url}"]
        servers = model_servers(texts, ["org/a=key-of-a", "mine=key-of-b"])
        self.app = ModelsGateway(servers, config(**public))
        self.front = stack.enter_context(GatewayThread(self.app))
        until(lambda: self.health()["up"] == up, "both to be up")

    def health(self) -> Any:
        return json.loads(asked(self.front.url, path="/health")[2])

    def ask(self, model: str | None, **more: Any) -> tuple[int, Any]:
        status, _, body = asked(self.front.url, {**chat(), "model": model}, **more)
        return status, json.loads(body)


@pytest.fixture
def world(monkeypatch):
    with ExitStack() as stack:
        yield lambda **public: World(stack, **public)
        monkeypatch.setattr(server, "_TOLD", 0.0)  # no front need hear of the end


def test_the_model_of_a_request_answers_it(world) -> None:
    one = world()
    for _ in range(2):
        assert one.ask("org/a")[0] == one.ask("mine")[0] == 200
    stream = asked(one.front.url, chat(stream=True, model="mine"))[2]
    assert stream == b"data: {}\n\n" * 3 + b"data: [DONE]\n\n"
    asked_for = [[body["model"] for body in one.engines[name].bodies] for name in "ab"]
    assert [set(names) - {"m"} for names in asked_for] == [{"org/a"}, {"org/b"}]  # m is a probe's
    metrics = asked(one.front.url, path="/metrics")[2].decode()
    assert all(f'engine_up{{engine="{name}"}} 1' in metrics for name in ("org/a", "mine"))
    # Each server knows by its own key that a front passes clients on.
    assert {record["client"] for record in one.records["a"]} == {"127.0.0.1"}


def test_the_list_has_every_name_and_an_unknown_one_is_a_404_that_names_them(world) -> None:
    one = world(api_key=("k",))
    key = {"authorization": "Bearer k"}
    cards = json.loads(asked(one.front.url, path="/v1/models", **key)[2])["data"]
    assert [card["id"] for card in cards] == ["org/a", "mine"]
    assert asked(one.front.url, path="/v1/models/mine", **key)[0] == 200
    assert asked(one.front.url, path="/anthropic/v1/models", **key)[0] == 200
    status, body = one.ask("x", **key)
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert "org/a, mine" in body["error"]["message"]
    status, body = one.ask(None, **key)
    assert (status, body["error"]["code"]) == (400, "model_missing")
    assert one.ask("mine")[0] == 401
    about = json.loads(asked(one.front.url, path="/about", **key)[2])
    assert [facts["name"] for facts in about["models"]] == ["org/a", "mine"]
    # One of the servers runs on pretend GPUs: the address says so.
    assert (about["pretend"], PRETEND_WORDS in about["notices"]) == (True, True)
    page = json.loads(asked(one.front.url, path="/health")[2])
    assert (page["status"], page["nodes"], page["up"]) == ("healthy", 2, 2)
    assert "mine" not in str(page)  # everybody may read it


def test_a_server_that_ends_is_told_of_and_the_other_serves_on(world) -> None:
    one = world()
    one.servers["a"].stop()
    status, body = one.ask("org/a")
    assert (status, body["error"]["code"]) == (503, "model_unavailable")
    assert "org/a" in body["error"]["message"]
    assert one.ask("mine")[0] == 200
    page = json.loads(asked(one.front.url, path="/health")[2])
    assert (page["status"], page["nodes"], page["up"]) == ("degraded", 2, 1)


def test_a_server_that_was_not_heard_yet_is_asked_for_its_names_first(world, monkeypatch) -> None:
    """Its own gateway does not know ours, and said 404."""

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(ModelsGateway, "_watch", never)
    assert world(up=0).ask("mine")[0] == 200
