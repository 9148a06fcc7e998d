"""Which paths there are, the page at the address, and by which names clients call the model."""

from __future__ import annotations

import ast
import json
import re
import shlex
from typing import Any

import pytest

from tests.support.gateway import (
    CHAT,
    PATCHES,
    TILES,
    ask,
    call,
    chat,
    gateway,
    plan_for,
)
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.http.routes import (
    ROUTES,
    api_of,
    find_route,
    hold_name,
    unambiguous,
)
from turbofit.gateway.http.welcome import client_lines, limits_in_words, welcome_page
from turbofit.gateway.limits.request_limits import bounds_of


@pytest.mark.parametrize("path", sorted(ROUTES))
def test_a_route_is_served_with_slashes_at_its_end(path: str) -> None:
    route = ROUTES[path]
    for slashes in (b"/", b"//"):
        assert find_route(route.method, path.encode() + slashes) is route
        assert api_of(path.encode() + slashes) == api_of(path.encode())


def test_a_slash_at_the_end_never_reaches_an_engine() -> None:
    app, upstream = gateway()
    assert ask(app, CHAT + "/", chat()).status == 200
    assert ask(app, "/v1/models/").status == 200
    assert [request[2] for request in upstream.seen] == [CHAT, "/v1/models"]


OWN = "OpenGVLab/InternVL2-2B"
NAMES = {OWN: OWN, "internvl2-2b": OWN, "InternVL2-2B": OWN, "mine": "mine"}
HELLO = [{"role": "user", "content": "Hello"}]
POSTED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": HELLO}),
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/messages", {"messages": HELLO, "max_tokens": 3}),
    ("/v1/messages/count_tokens", {"messages": HELLO}),
    ("/v1/responses", {"input": "a"}),
]


@pytest.mark.parametrize(("path", "body"), POSTED)
async def test_each_name_is_answered_on_every_route(path: str, body: dict[str, Any]) -> None:
    app, recorder = gateway(names=NAMES)
    for name in NAMES:
        assert (await call(app, path, {**body, "model": name})).status == 200
    assert [sent["model"] for sent in recorder.bodies] == [OWN, OWN, OWN, "mine"]
    reply = await call(app, path, {**body, "model": "gpt-4o"})
    assert reply.status == 404
    message = reply.json["error"]["message"]
    assert message == f"The model 'gpt-4o' does not exist; there are {', '.join(NAMES)}"
    assert reply.json["error"]["type"] == "not_found_error"
    assert len(recorder.bodies) == len(NAMES)


async def test_the_list_has_every_name_and_says_which_model_it_means() -> None:
    app, recorder = gateway(names=NAMES)
    cards = (await call(app, "/v1/models", method="GET")).json["data"]
    assert [(card["id"], card["root"]) for card in cards] == list(NAMES.items())
    anthropic = (await call(app, "/anthropic/v1/models", method="GET")).json
    assert [card["id"] for card in anthropic["data"]] == list(NAMES)
    assert anthropic["first_id"] == OWN
    assert recorder.bodies == []


def test_a_body_without_a_model_stays_as_it_is() -> None:
    body: dict[str, Any] = {"input": "a"}
    hold_name(NAMES, body)
    assert body == {"input": "a"}
    with pytest.raises(Refusal, match=r"\['x'\]"):
        hold_name(NAMES, {"model": ["x"]})


def test_names_that_mean_two_models_mean_none() -> None:
    assert unambiguous([("a/m", "m", "m"), ("b/m", "m")]) == [("a/m",), ("b/m",)]
    # A model's own name is its own, whatever else is called so.
    assert unambiguous([("m", "a/m"), ("b/m", "m")]) == [("m", "a/m"), ("b/m",)]
    assert unambiguous([("x",), ("y", "z")]) == [("x",), ("y", "z")]


def test_the_lines_are_one_request_with_a_key_of_the_environment() -> None:
    shell, _ = client_lines("http://127.0.0.1:1", "o'b/m", key=False)
    curl, url, _, header, _, body = shlex.split(shell)
    assert (curl, url) == ("curl", "http://127.0.0.1:1/v1/chat/completions")
    assert header == "Content-Type: application/json"
    assert json.loads(body)["model"] == "o'b/m"
    shell, python = client_lines("http://h:1", "m", key=True)
    assert "Bearer $API_KEY" in shell
    called = ast.dump(ast.parse(python, mode="eval"))
    assert "http://h:1/v1" in called
    assert "API_KEY" in called


@pytest.mark.parametrize("path", ["/", "/docs", "/docs/"])
async def test_it_shows_model_limits_example_and_routes(path: str) -> None:
    app, upstream = gateway(names={"org/<b>m": "org/m", "m": "org/m"})
    reply = await call(app, path, method="GET", headers={"host": "box:8000"})
    assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    text = reply.body.decode()
    for words in (
        "turbofit serves org/&lt;b&gt;m</h1>", "turbofit chat http://box:8000</pre>",
        "2 images of 12 tiles, or 26 smaller ones; a larger image is made smaller",
        '<a href="/metrics">/metrics</a>',
    ):  # fmt: skip
        assert words in text
    assert not re.search("<script|<b>", text)
    assert (await call(app, path, {})).status == 404
    assert upstream.bodies == []


async def test_who_shows_no_key_learns_only_where_to_put_it() -> None:
    app, _ = gateway(names={"secret-model": "m"}, api_keys=("k",))
    reply = await call(app, "/", method="GET")
    assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert 'refused_total{reason="unauthorized"} 1' in app.metrics.text({})
    assert b"Authorization: Bearer KEY" in reply.body
    assert not re.search(b"secret-model|/v1/", reply.body)
    reply = await call(app, "/", method="GET", headers={"authorization": "Bearer k"})
    assert reply.status == 200
    assert b"Bearer $API_KEY" in reply.body


def test_a_host_that_is_none_is_not_shown() -> None:
    page = welcome_page("http", "a<script>", {}, key=False, notice="PRETEND <GPUs>").decode()
    assert "script" not in page
    assert "http://HOST" in page
    assert "PRETEND &lt;GPUs&gt;" in page


def test_limits_are_those_of_the_plan() -> None:
    tiles, patches = (limits_in_words(bounds_of(plan_for(rule))) for rule in (TILES, PATCHES))
    assert "tokens: prompt, images and answer together" in tiles[0]
    assert tiles[1].startswith("2 images of 12 tiles")
    assert patches[1].startswith("2 images of 12,845,056 pixels")
    assert tiles[2] == "4 answers at once (n)"
