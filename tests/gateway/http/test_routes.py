from __future__ import annotations

import pytest

from tests.support.gateway import CHAT, Answer, Recorder, ask, chat, gateway, plan_for
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.http.routes import ROUTES, api_of, find_route, is_health


@pytest.mark.parametrize("path", sorted(ROUTES))
@pytest.mark.parametrize("slashes", [b"/", b"//"])
def test_a_route_is_served_with_slashes_at_its_end(path: str, slashes: bytes) -> None:
    route = ROUTES[path]
    assert find_route(route.method, path.encode() + slashes) is route
    assert api_of(path.encode() + slashes) == api_of(path.encode())


def test_a_slash_at_the_end_never_reaches_an_engine() -> None:
    app, upstream = gateway()
    assert ask(app, CHAT + "/", chat()).status == 200
    assert ask(app, "/v1/models/").status == 200
    assert [seen[2] for seen in upstream.seen] == [CHAT, "/v1/models"]


def test_the_health_page_needs_no_key_with_a_slash_either() -> None:
    app, _ = gateway(api_keys=("one",))
    assert is_health(b"/health/")
    assert not is_health(b"/healthy")
    assert ask(app, "/health/").status == ask(app, "/health").status == 503
    assert ask(app, "/v1/models/").status == 401


@pytest.mark.parametrize(
    ("path", "why"),
    [
        (b"/v1/embeddings", "LMDeploy makes no embeddings"),
        (b"/get_ppl", "no plan counts"),
        (b"/pooling/", "no plan counts"),
        (b"/sleep", "it manages the engine"),
        (b"/nodes/anything", "it manages the engine"),
    ],
)
def test_a_closed_route_says_why(path: bytes, why: str) -> None:
    with pytest.raises(Refusal, match=why) as caught:
        find_route("POST", path)
    assert caught.value.status == 403


def test_texts_are_tokenised_by_the_engine() -> None:
    recorder = Recorder(lambda *_: Answer(b'{"input_ids":[1],"length":1}'))
    app, _ = gateway(recorder=recorder)
    reply = ask(app, "/v1/encode", {"input": "x", "add_bos": False, "session_id": 3})
    assert (reply.status, reply.json["length"]) == (200, 1)
    assert ask(app, "/v1/encode", {"input": ["x", "y"], "do_preprocess": True}).status == 200
    assert recorder.bodies == [
        {"input": "x", "add_bos": False},
        {"input": ["x", "y"], "do_preprocess": True},
    ]
    # Tokenising proves nothing about completions.
    assert app.engines[0].last_success == float("-inf")


@pytest.mark.parametrize("given", [{}, {"input": None}, {"input": 3}, {"input": ["x", 3]}])
def test_only_text_is_tokenised(given: dict) -> None:
    app, upstream = gateway()
    reply = ask(app, "/v1/encode", given)
    assert (reply.status, reply.json["param"], upstream.seen) == (400, "input", [])


@pytest.mark.parametrize("given", ["x" * ((1 << 18) + 1), ["x"] * (1 << 13)])
def test_what_is_tokenised_at_once_is_bounded(given: object) -> None:
    app, upstream = gateway(plan_for())
    reply = ask(app, "/v1/encode", {"input": given})
    assert (reply.status, reply.json["reason"], upstream.seen) == (413, "text_too_big", [])
    assert str(1 << 18) in reply.json["message"]
    assert ask(app, "/v1/encode", {"input": given[: 1 << 11]}).status == 200
