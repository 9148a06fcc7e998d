"""A client may give any of the model's names, on every route; the engine hears its own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.gateway import CHAT, Recorder, call, chat, gateway
from turbofit.gateway.http.model_names import hold_name, unambiguous
from turbofit.gateway.http.refusals import Refusal

OWN = "OpenGVLab/InternVL2-2B"
NAMES = {OWN: OWN, "internvl2-2b": OWN, "InternVL2-2B": OWN, "mine": "mine"}
HELLO = [{"role": "user", "content": "Hello"}]
ROUTES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": HELLO}),
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/messages", {"messages": HELLO, "max_tokens": 3}),
    ("/v1/messages/count_tokens", {"messages": HELLO}),
    ("/v1/responses", {"input": "a"}),
]


@pytest.mark.parametrize(("path", "body"), ROUTES)
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


async def test_without_names_everything_is_passed_on() -> None:
    app, recorder = gateway(recorder=Recorder())
    assert (await call(app, CHAT, {**chat(), "model": "gpt-4o"})).status == 200
    assert [sent["model"] for sent in recorder.bodies] == ["gpt-4o"]


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
