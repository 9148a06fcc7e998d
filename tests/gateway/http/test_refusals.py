"""Refusals and errors of engines, in the form of the client's API."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.gateway.http.test_app import ANTHROPIC, POSTED
from tests.support.gateway import (
    CHAT,
    Answer,
    Recorder,
    anthropic,
    ask,
    chat,
    data_url,
    gateway,
    image_part,
    picture,
)

MANY = {"message": "27 images in a request, the limit is 26", "type": "invalid_request_error"}


@pytest.mark.parametrize(
    ("path", "body", "document"),
    [
        (CHAT, chat(*[image_part()] * 27),
         {"error": {**MANY, "code": "too_many_images", "param": None}}),
        ("/generate", {"prompt": "x", "image_data": [data_url(picture(9, 9))] * 27},
         {**MANY, "object": "error", "code": 400, "param": None,
          "reason": "too_many_images"}),
        ("/v1/messages", anthropic(*[picture(9, 9)] * 27),
         {"type": "error", "error": MANY, "request_id": "abc-1"}),
    ],
)  # fmt: skip
def test_refusals_speak_the_language_of_their_api(path, body, document) -> None:
    app, upstream = gateway()
    reply = ask(app, path, body, headers={"x-request-id": "abc-1"})
    assert (reply.status, upstream.seen) == (400, [])
    assert reply.json == document


@pytest.mark.parametrize(
    ("path", "message", "param", "words"),
    [
        (CHAT, "Please launch the api_server with --tool-call-parser if you want to use tools.",
         "tools", "turbofit serve MODEL --tool-call-parser NAME"),
        ("/v1/messages", "Please launch the api_server with --tool-call-parser if you want to use "
         "tool calling.", None, "turbofit serve MODEL --tool-call-parser NAME"),
        (CHAT, "Logprobs(True)/top_logprobs(0) requested but not enabled logprobs_mode in engine "
         "configuration", "logprobs", "-- --logprobs-mode raw_logprobs"),
        (CHAT, "routed experts requested but not configured in engine configuration. May start "
         "api_server with --enable-return-routed-experts flag.", "return_routed_experts",
         "-- --enable-return-routed-experts"),
    ],
)  # fmt: skip
def test_an_option_that_the_engine_lacks_is_named_as_turbofit_takes_it(
    path: str, message: str, param: str | None, words: str
) -> None:
    document = json.dumps({"message": message, "code": 400}).encode()
    app, _ = gateway(recorder=Recorder(lambda *_: Answer(document, status=400)))
    body = ANTHROPIC if path == "/v1/messages" else chat()
    reply = ask(app, path, body=body)
    assert reply.status == 400
    error = json.loads(reply.body)["error"]
    assert words in error["message"]
    assert error.get("param") == param


def body_for(path: str) -> dict[str, Any]:
    return {**dict(POSTED), "/generate": {"prompt": "a"}}[path]


#: What LMDeploy 0.18 answers: of FastAPI's own, of chats, of messages, of responses.
FLAT = {"object": "error", "type": "invalid_request_error", "code": 400, "param": None}


OF_MESSAGES = {"type": "error", "error": {"type": "api_error", "message": "m: Field required"}}


OF_RESPONSES = {"error": {"message": "m: Field required", "type": "t", "param": "m", "code": 400}}


@pytest.mark.parametrize(
    ("path", "status", "said", "message"),
    [
        (
            CHAT,
            400,
            {**FLAT, "message": "messages must not be empty"},
            "messages must not be empty",
        ),
        (CHAT, 404, {"detail": "Not Found"}, "Not Found"),
        (CHAT, 500, "Internal Server Error", "the engine failed: Internal Server Error"),
        ("/v1/completions", 409, {**FLAT, "message": "occupied"}, "occupied"),
        ("/v1/responses", 400, OF_RESPONSES, "m: Field required"),
        ("/v1/responses", 500, "Internal Server Error", "the engine failed: Internal Server Error"),
        ("/v1/messages", 400, OF_MESSAGES, "m: Field required"),
        ("/v1/messages", 400, {**FLAT, "message": "no"}, "no"),
        ("/v1/messages", 500, "Internal Server Error", "the engine failed: Internal Server Error"),
        ("/generate", 400, {**FLAT, "message": "no"}, "no"),
    ],
)
def test_errors_of_the_engine_have_the_form_of_the_clients_api(path, status, said, message) -> None:
    data = said.encode() if isinstance(said, str) else json.dumps(said).encode()
    kind = "text/plain" if isinstance(said, str) else "application/json"
    recorder, records = Recorder(lambda *_: Answer(data, status=status, kind=kind)), []
    app, _ = gateway(engines=2, recorder=recorder, log=records.append)
    reply = ask(app, path, body=body_for(path))
    assert (reply.status, len(recorder.seen)) == (status, 1)
    assert reply.headers["content-type"] == "application/json"
    error = reply.json if path == "/generate" else reply.json["error"]
    assert error["message"] == message
    assert error["type"]
    if path == "/v1/messages":
        assert reply.json["type"] == "error"
    else:
        assert {"code", "param"} <= set(error)
    assert records[0]["status"] == status
