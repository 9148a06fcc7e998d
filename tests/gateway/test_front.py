"""A front before nodes, on real sockets: real gateways before simple servers as engines."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event
from typing import Any

import pytest

from tests.gateway.test_server import Engine, asked, certificate, config, streamed
from tests.support.gateway import CHAT, chat, plan_for
from tests.support.waiting import HANG, until
from turbofit.gateway import server
from turbofit.gateway.front import Front, NodeAddress
from turbofit.gateway.http.asgi_app import AsgiApp
from turbofit.gateway.http.prepare import PreparedBody
from turbofit.gateway.http.request_context import answer
from turbofit.gateway.server import GatewayThread
from turbofit.serving.plan_gateway import make_gateway

KEY = "run-key"


@pytest.fixture
def world(monkeypatch):
    """Makes nodes and fronts, and ends them; no front need hear of that."""
    with ExitStack() as stack:
        yield World(stack)
        monkeypatch.setattr(server, "_TOLD", 0.0)


class World:
    def __init__(self, stack: ExitStack) -> None:
        self.stack, self.records = stack, {}

    def node(self, name: str, *, key: str = KEY, files=None, **about):
        engine, records = self.stack.enter_context(Engine()), []
        settings = config(front_keys=(KEY,), **(files or {}))
        app = make_gateway(plan_for(), [engine.url], settings, log=records.append, overlay=False)
        app.config = app.config.changed(about=app.config.about | about)
        thread = self.stack.enter_context(GatewayThread(app))
        self.records[name] = records
        return NodeAddress(name=name, url=thread.url, key=key), engine, thread

    def front(self, *nodes: NodeAddress, source=None, up: int = -1, **changes):
        """A front of them, once so many are up: all, if nothing is said."""
        app = Front(source or (lambda: nodes), config(**changes))
        thread = self.stack.enter_context(GatewayThread(app))
        self.up(thread, len(nodes) if up < 0 else up)
        return app, thread

    def up(self, front: GatewayThread, count: int) -> None:
        until(
            lambda: front.call(lambda app: app._health(None)[0]["up"]) == count, f"{count} nodes up"
        )


def test_answers_and_streams_pass_with_their_limits_and_who_asks_is_told_to_the_node(world) -> None:
    address, _, node = world.node("a")
    _, front = world.front(address, api_key=("alice", "bob"))
    bob = {"authorization": "Bearer bob"}
    status, _, body = asked(front.url, chat(), authorization="Bearer alice")
    assert (status, json.loads(body)) == (200, {"choices": [{}]})
    stream = asked(front.url, chat(stream=True), **bob)[2]
    assert stream == b"data: {}\n\n" * 3 + b"data: [DONE]\n\n"
    status, headers, body = asked(front.url, chat(n=999), **bob)
    assert status == 400
    assert "999 answers" in json.loads(body)["error"]["message"]
    assert "x-request-id" in headers
    assert asked(front.url, chat())[0] == 401
    assert asked(front.url, {}, path="/update_weights", **bob)[0] == 403
    records = [record for record in world.records["a"] if record["route"] == CHAT]
    assert [record["client"] for record in records] == ["127.0.0.1"] * 3
    keys = [record["key"] for record in records]
    assert keys[0] != keys[1] == keys[2]
    # From that key alone: anybody else is who he is.
    assert asked(node.url, chat(), **{"x-turbofit-client": "10.9.9.9"})[0] == 401
    page = json.loads(asked(front.url, path="/health")[2])
    assert (page["nodes"], page["up"]) == (1, 1)
    metrics = asked(front.url, path="/metrics", **bob)[2]
    assert b'turbofit_gateway_engine_up{engine="a"} 1' in metrics


def test_a_node_gets_what_is_left_of_its_capacity(world) -> None:
    """Of its capacity with the engines that are up; one that drains gets nothing."""
    large = world.node("a", at_once=60, engines=2, up=1)[0]
    small, leaving = world.node("b", at_once=10)[0], world.node("c", draining=True)[0]
    app, _ = world.front(large, small, leaving, up=2)
    for _ in range(400):
        app.fleet.best(PreparedBody().cost).outstanding += 1
    assert [node.outstanding for node in app.nodes.values()] == [300, 100, 0]


@pytest.mark.parametrize("keeps", [True, False])
def test_a_node_keeps_its_conversations(world, keeps: bool) -> None:
    nodes = [world.node(name, prefix_caching=keeps)[0] for name in "ab"]
    app, front = world.front(*nodes)
    body, (a, b) = chat(), app.nodes.values()
    a.outstanding = 1
    asked(front.url, body)
    a.outstanding = 0
    for _ in range(3):
        body["messages"] += [{"role": "assistant", "content": "A cat."}, *chat()["messages"]]
        asked(front.url, body)
    chats = [record for record in world.records["b"] if record["route"] == CHAT]
    assert len(chats) == (4 if keeps else 1), b.index


ODD = {
    "at_once of text": b'{"at_once": "many"}', "at_once below 0": b'{"at_once": -5}',
    "at_once without end": b'{"at_once": 1e308}', "engines of text": b'{"engines": "x"}',
    "up of truth": b'{"up": true}', "bytes of text": b'{"bytes_per_body": "big"}',
    "bytes below 0": b'{"bytes_per_body": -1}', "bytes beyond all": b'{"bytes_per_body": 1e15}',
    "a list": b"[1]", "NaN": b'{"at_once": NaN}', "deep": b"[" * 100_000, "too large": b"",
}  # fmt: skip


@pytest.mark.parametrize("body", ODD.values(), ids=ODD)
def test_a_node_with_an_odd_health_page_is_out_with_the_reason(world, body, monkeypatch) -> None:
    """The front's own pages go on, and requests go to the other node."""
    (first, _, odd), (second, _, _) = world.node("a", at_once=1000), world.node("b")
    app, front = world.front(first, second)
    most = app._bodies._most

    async def page(request: Any, route: Any, send: Any) -> bool:
        if route.kind != "health":
            return await AsgiApp._page(odd._gateway, request, route, send)
        await answer(request, send, 200, body or bytes(5 << 20), "application/json")
        return True

    monkeypatch.setattr(odd._gateway, "_page", page)
    world.up(front, 1)
    assert [asked(front.url, chat())[0] for _ in range(3)] == [200] * 3
    assert not [record for record in world.records["a"] if record["route"] == CHAT]
    assert json.loads(asked(front.url, path="/health")[2])["at_once"] < 100
    assert b'engine_up{engine="a"} 0' in asked(front.url, path="/metrics")[2]
    (notice,) = json.loads(asked(front.url, path="/about")[2])["notices"]
    reason = "gives a health page that is not valid: " if body else "does not answer"
    assert notice.startswith(f"a {reason}")
    assert app._bodies._most == most


@pytest.mark.parametrize(
    "body", [b'{"x": ' + b"[" * 100_000, b"[1]", b"no JSON"], ids=["deep", "a list", "text"]
)
def test_a_node_with_an_odd_page_about_serves_and_the_front_stays_healthy(
    world, body, monkeypatch
) -> None:
    address, _, odd = world.node("a")
    shown = Event()

    async def page(request: Any, route: Any, send: Any) -> bool:
        if route.kind != "about":
            return await AsgiApp._page(odd._gateway, request, route, send)
        await answer(request, send, 200, body, "application/json")
        shown.set()
        return True

    monkeypatch.setattr(odd._gateway, "_page", page)
    app, front = world.front(address)
    assert shown.is_set()
    status, _, page_of_front = asked(front.url, path="/health")
    assert (status, json.loads(page_of_front)["status"]) == (200, "healthy")
    assert asked(front.url, chat())[0] == 200
    (node,) = app.nodes.values()
    assert (node.trouble, node.about.pretend, node.about.models) == ("", False, ())


def test_a_front_heeds_its_bound_of_all_requests_at_once(world) -> None:
    address, engine, _ = world.node("a")
    app, front = world.front(address, max_concurrent_requests=2)
    with ThreadPoolExecutor(4) as pool:
        long = {"stream": True, "max_tokens": 4}
        answers = [pool.submit(asked, front.url, chat(**long)) for _ in range(4)]
        until(lambda: app._forwarder.admission.waiting == 2, "two to wait")
        until(lambda: sum("stream" in body for body in engine.bodies) == 2, "two at the engine")
        for _ in answers:
            engine.permit()
        assert [answer.result()[0] for answer in answers] == [200] * 4


def test_what_no_engine_had_goes_to_another_node_and_nothing_is_lost(world) -> None:
    first, engine, _ = world.node("a", at_once=1000)
    _, front = world.front(first, world.node("b", at_once=1)[0])
    engine.close()  # its node refuses at once, and has by far the most room
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: asked(front.url, chat())[0], range(60)))
    assert answers == [200] * 60
    until(lambda: front.call(lambda app: app.fleet.open == 1), "the node to be out")


def test_a_node_that_ends_in_order_loses_nothing_though_nobody_told_the_front(world) -> None:
    first, _, node = world.node("a", at_once=1000)
    _, front = world.front(first, world.node("b")[0])
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(asked, front.url, chat(stream=True)) for _ in range(60)]
        node.stop()
        assert {answer.result()[0] for answer in answers} == {200}
        assert all(answer.result()[2].endswith(b"[DONE]\n\n") for answer in answers)


def test_a_node_with_another_key_is_out_and_its_client_hears_nothing_of_it(world) -> None:
    first, second = world.node("a", key="wrong", at_once=1000)[0], world.node("b")[0]
    app, front = world.front(first, second, up=1)
    (node, _) = app.nodes.values()
    until(lambda: "--upstream-key" in node.trouble, "the reason")
    assert [asked(front.url, chat())[0] for _ in range(3)] == [200] * 3
    node.up, node.share = True, 1000.0  # as where its key has changed
    assert asked(front.url, chat())[0] == 200
    until(lambda: not node.up, "the node to be out")


def test_a_node_under_tls_needs_a_certificate_of_a_known_authority(world, tmp_path) -> None:
    address, _, _ = world.node("a", files=certificate(tmp_path, "127.0.0.1"))
    app, _ = world.front(address, up=0)
    assert not app.fleet.open


def test_a_body_is_held_until_its_answer_begins_and_who_leaves_stops_the_engine(world) -> None:
    address, engine, _ = world.node("a")
    app, front = world.front(address)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(asked, front.url, chat(stream=True, max_tokens=4))
        until(lambda: engine.bodies, "the request")
        until(lambda: not app._bodies.in_memory, "its body to be let go")
        assert not answer.done()
        engine.permit()
        assert answer.result()[2].endswith(b"[DONE]\n\n")
    with streamed(front.url) as response:
        assert response.readline() == b"data: {}\n"
    assert engine.left.wait(HANG)


def test_nodes_come_and_go_while_what_they_have_ends(world) -> None:
    """A source that knows none, or fails, leaves those that are known."""
    (first, engine, _), (second, _, _) = world.node("a"), world.node("b")
    now: list[object] = [[first]]
    asks: list[object] = []

    def source() -> object:
        asks.append(now[0])
        if isinstance(now[0], Exception):
            raise now[0]
        return now[0]

    app, front = world.front(source=source, up=1)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(asked, front.url, chat(stream=True, max_tokens=4))
        until(lambda: engine.bodies, "the request to be there")
        for now[0] in (OSError(), []):
            asks.clear()
            until(lambda: len(asks) > 1, "the source to be asked again")
            assert list(app.nodes) == [first]
        now[0] = [second]
        until(lambda: list(app.nodes) == [second], "the other node")
        world.up(front, 1)
        assert asked(front.url, chat())[0] == 200
        engine.permit()
        assert long.result()[2] == b"data: {}\n\n" * 4 + b"data: [DONE]\n\n"
    assert not [e for e in world.records["a"] if e["route"] == CHAT and e["status"] != 200]


def test_a_front_ends_though_its_source_never_answers() -> None:
    asked_for, answers = Event(), Event()

    def silent() -> list[NodeAddress]:
        asked_for.set()
        answers.wait()
        return []

    front = GatewayThread(Front(silent, config()))
    front.start()
    assert asked_for.wait(HANG)
    front.stop(drain=False)
    assert not front._thread.is_alive()
    answers.set()
