"""Paths, their methods, and the names by which clients may call a model."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.http.test_app import POSTED
from tests.support.gateway import (
    CHAT,
    ask,
    call,
    chat,
    gateway,
)
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.http.routes import ROUTES, api_of, find_route, hold_name


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/v1/embeddings", "LMDeploy makes no embeddings"), ("/v1/encode", "count_tokens counts"),
        ("/get_ppl", "no plan counts"), ("/pooling/", "no plan counts"),
        ("/sleep//", "it manages the engine"), ("/nodes/anything", "it manages the engine"),
        ("/update_weights", "it manages the engine"), ("/terminate", "it manages the engine"),
        ("/distserve/p2p_connect", "it manages the engine"),
        *((path, "") for path in (
            "/openapi.json", "/v1", "/v1/chat", "//v1/chat/completions", "/v1/models/x",
            "/V1/chat/completions", "/v1/chat/%63ompletions", "/v1/./chat/completions", "*",
            "http://127.0.0.1/v1/models", "/v1/chat/completions%00", "/é",
            "//update_weights", "/UPDATE_WEIGHTS", "/update%5Fweights", "/./sleep",
            "/v1/../update_weights", "/v1/%2e%2e/update_weights", "/%2e%2e%2fget_ppl",
            "/v1/models/..;/../sleep", "/%252e%252e/get_ppl", "\\get_ppl", "/get_ppl;x=1",
        )),
    ],
)  # fmt: skip
def test_closed_routes_say_why_and_others_do_not_exist(path, why) -> None:
    app, upstream = gateway()
    for method in ("GET", "POST"):
        reply = ask(app, path, {}, method=method)
        one_model = path.startswith("/v1/models/") and method == "POST"
        status = 405 if one_model else 403 if why else 404
        assert (reply.status, upstream.seen) == (status, [])
        assert why in reply.json["error"]["message"]


def test_methods_are_those_of_the_route_and_head_is_asked_as_get() -> None:
    app, upstream = gateway()
    for path, method in ((CHAT, "GET"), ("/v1/models", "POST"), ("/v1/models", "DELETE")):
        assert ask(app, path, method=method).status == 405
    for method in ("GET", "HEAD"):
        assert ask(app, "/v1/models", method=method).status == 200
        assert upstream.seen.pop()[1:3] == ("GET", "/v1/models")


def test_a_route_is_served_with_slashes_at_its_end_which_reach_no_engine() -> None:
    for path, route in ROUTES.items():
        for slashes in (b"/", b"//"):
            assert find_route(route.method, path.encode() + slashes) is route
            assert api_of(path.encode() + slashes) == api_of(path.encode())
    app, upstream = gateway()
    assert ask(app, CHAT + "/", chat()).status == ask(app, "/v1/models/").status == 200
    assert [request[2] for request in upstream.seen] == [CHAT, "/v1/models"]


@pytest.mark.parametrize("listing", ["/v1/models", "/anthropic/v1/models"])
def test_a_model_is_retrieved_by_any_of_its_names(listing: str) -> None:
    app, upstream = gateway(names=NAMES)
    listed = {card["id"]: card for card in ask(app, listing).json["data"]}
    for name in NAMES:
        for path in (f"{listing}/{name}", f"{listing}/{name.replace('/', '%2F')}/"):
            assert ask(app, path).json == listed[name]
    for name in ("other", "../../sleep", "a/models/b"):
        reply = ask(app, f"{listing}/{name}")
        assert (reply.status, "InternVL2-2B" in reply.json["error"]["message"]) == (404, True)
    app, _ = gateway()  # only the engines know their names
    assert (ask(app, f"{listing}/m").status, upstream.seen) == (404, [])


OWN = "OpenGVLab/InternVL2-2B"

NAMES = {OWN: OWN, "internvl2-2b": OWN, "InternVL2-2B": OWN, "mine": "mine"}


@pytest.mark.parametrize(("path", "body"), POSTED)
async def test_each_name_is_answered_on_every_route(path: str, body: dict[str, Any]) -> None:
    app, recorder = gateway(names=NAMES)
    for name in NAMES:
        assert (await call(app, path, {**body, "model": name})).status == 200
    assert [sent["model"] for sent in recorder.bodies] == [OWN, OWN, OWN, "mine"]
    reply = await call(app, path, {**body, "model": "gpt-4o"})
    assert (reply.status, reply.json["error"]["type"]) == (404, "not_found_error")
    message = f"The model 'gpt-4o' does not exist; there are {', '.join(NAMES)}"
    assert reply.json["error"]["message"] == message
    assert len(recorder.bodies) == len(NAMES)
    hold_name(NAMES, body)
    assert "model" not in body
    with pytest.raises(Refusal, match=r"\['x'\]"):
        hold_name(NAMES, {"model": ["x"]})


@pytest.mark.parametrize("path", ["/", "/docs", "/none", "/update_weights", *ROUTES])
async def test_a_name_that_is_not_the_servers_gets_nothing_on_any_route(path: str) -> None:
    """A page whose name leads to its visitor's loopback sends no `Origin`, only its name."""
    app, upstream = gateway(names={"m": "m"})
    for method in ("GET", "POST", "OPTIONS"):
        reply = await call(app, path, chat(), method=method, headers={"host": "evil.example:1"})
        assert (reply.status, "--allowed-hosts evil.example" in str(reply.json)) == (421, True)
    assert upstream.seen == []
    reply = await call(app, path, method="HEAD", headers={"host": "localhost:23333"})
    assert reply.status != 421
