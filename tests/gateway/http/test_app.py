"""The app: what passes, what is refused in which form, and what is recorded."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from tests.support.gateway import (
    CHAT,
    DONE,
    EVENT,
    Answer,
    Recorder,
    anthropic,
    ask,
    call,
    chat,
    data_url,
    gateway,
    image_part,
    picture,
    stream,
)
from turbofit.gateway.http import body as body_module
from turbofit.gateway.http.prepare import Preparation

ANTHROPIC = anthropic(picture(448, 5376))


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
    ("keywords", "status"),
    [
        ({"body": chat(), "kind": "text/plain"}, 415),
        ({"body": chat(), "kind": "application/json; charset=utf-8"}, 200),
        ({"body": chat(), "headers": {"content-encoding": "gzip"}}, 415),
        ({"raw": b"{", "method": "POST"}, 400),
        ({"raw": b"", "method": "POST"}, 400),
        ({"raw": b"[" * 100_000, "method": "POST"}, 400),
        ({"raw": b'{"a":NaN}', "method": "POST"}, 400),
        ({"raw": b'{"seed":-1e999}', "method": "POST"}, 400),
        ({"raw": b'\xef\xbb\xbf{"model":"m","messages":"x"}', "method": "POST"}, 200),
        ({"raw": b"\xef\xbb\xbf\xef\xbb\xbf{}", "method": "POST"}, 400),
        ({"raw": b'{"messages":"\\ud800"}', "method": "POST"}, 400),
        ({"raw": b'{"messages":"\xff"}', "method": "POST"}, 400),
        ({"raw": b"{}", "headers": {"content-length": "99999999999"}}, 413),
        ({"raw": b" " * (20 << 20), "method": "POST"}, 413),
        ({"body": chat(seed=10**30)}, 200),
        ({"body": {"model": "m", "messages": "x" * (4 << 20)}}, 413),
    ],
)
def test_bodies(keywords, status) -> None:
    app, _ = gateway()
    assert ask(app, **keywords).status == status


def test_request_ids_are_kept_where_harmless() -> None:
    app, upstream = gateway()
    reply = ask(app, body=chat(), headers={"x-request-id": "abc-1"})
    assert reply.headers["x-request-id"] == upstream.seen[-1][4]["X-Request-Id"] == "abc-1"
    other = ask(app, body=chat(), headers={"x-request-id": "a\r\nb"}).headers["x-request-id"]
    assert len(other) == 32


def test_what_is_lowered_is_said_and_the_log_holds_no_prompt_and_no_image(caplog) -> None:
    caplog.set_level("DEBUG", logger="turbofit")
    records = []
    app, upstream = gateway(log=records.append, api_key=("secret-key",))
    body = chat(image_part(640, 480, detail="high"), max_tokens=9)
    body["messages"][0]["content"][0]["text"] = "a very private question"
    reply = ask(app, body=body, headers={"authorization": "Bearer secret-key"})
    assert (reply.status, reply.headers["x-turbofit-limited"]) == (200, "detail=high->12")
    (sent,) = upstream.bodies
    image = sent["messages"][0]["content"][1]["image_url"]
    assert (set(image), image["max_dynamic_patch"]) == ({"url", "max_dynamic_patch"}, 12)
    assert sent["max_tokens"] == 9
    (record,) = records
    text = json.dumps(record) + caplog.text
    assert not re.search("private|secret|base64", text)
    assert (record["images"], record["units"]) == (1, 13)
    assert (record["limited"], record["status"]) == (["detail=high->12"], 200)


def test_token_counts_include_images_without_sending_them() -> None:
    app, upstream = gateway(recorder=Recorder(lambda *_: Answer(b'{"input_tokens":7}')))
    path, messages = "/v1/messages/count_tokens", ANTHROPIC["messages"]
    assert ask(app, path, {"messages": messages}).json == {"input_tokens": 7 + 13 * 256}
    assert upstream.bodies[0]["messages"][0]["content"] == [{"type": "text", "text": ""}]
    # Images make no room for text.
    body = anthropic(picture(64, 64) + bytes(1 << 20))
    text = {"type": "text", "text": "x" * (app.bounds.beside_images + 1)}
    body["messages"][0]["content"].append(text)
    reply = ask(app, path, {"messages": body["messages"]})
    assert (reply.status, len(upstream.seen)) == (413, 1)
    assert "context of 32768 tokens" in reply.json["error"]["message"]


async def test_streams_pass_event_by_event() -> None:
    parts = (EVENT, EVENT[:9], EVENT[9:] + EVENT, 0.02, DONE)
    app, _ = gateway(recorder=Recorder(lambda *_: stream(*parts)))
    reply = await call(app, body=chat(stream=True))
    assert (reply.body, reply.chunks[:2]) == (EVENT * 3 + DONE, [EVENT, EVENT + EVENT])
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.done


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (CHAT, chat(stream=True), (b'data: {"error":', b"data: [DONE]\n\n")),
        ("/v1/completions", {"prompt": "x", "stream": True}, (b'data: {"error":',)),
        ("/generate", {"prompt": "x", "stream": True}, (b'data: {"error":',)),
        ("/v1/responses", {"input": "x", "stream": True}, (b"event: error\n", b'"type":"error"')),
        ("/v1/messages", ANTHROPIC, (b"event: error\n", b'"overloaded_error"')),
    ],
)
def test_an_engine_that_dies_in_a_stream_ends_it_with_an_error_event(path, body, words) -> None:
    answer = stream(EVENT, EVENT[:20], OSError("reset"))
    app, recorder = gateway(engines=2, recorder=Recorder(lambda *_: answer))
    reply = ask(app, path, body)
    assert (reply.status, reply.done, len(recorder.seen)) == (200, True, 1)
    assert reply.body.startswith(EVENT)
    tail = reply.body[len(EVENT) :]
    assert EVENT[:20] not in tail
    assert all(word in tail for word in words), tail
    assert all(line == b"" or b": " in line for line in tail.split(b"\n"))
    assert answer.closed


@pytest.mark.parametrize(
    "answer",
    [
        stream(OSError("reset")), stream(), Answer(OSError("reset")),
        Answer(b'{"half', OSError("reset")), OSError("refused"),
    ],
)  # fmt: skip
def test_an_engine_that_dies_before_it_answers_gives_503(answer) -> None:
    app, _ = gateway(recorder=Recorder(lambda *_: answer))
    reply = ask(app, body=chat(stream=True))
    assert (reply.status, reply.headers["retry-after"]) == (503, "5")
    assert (reply.json["error"]["code"], app.engines[0].outstanding) == ("engine_died", 0)


async def test_a_client_that_goes_away_stops_the_engine() -> None:
    records: list[dict] = []
    answer, gone = stream(EVENT, 30.0, DONE), asyncio.Event()
    app, _ = gateway(recorder=Recorder(lambda *_: answer), log=records.append)
    asyncio.get_running_loop().call_later(0.05, gone.set)
    await asyncio.wait_for(call(app, body=chat(stream=True), leave=gone), 2)
    assert answer.closed
    assert (app.engines[0].outstanding, app.engines[0].gate.counted) == (0, 0)
    assert (records[0]["refused"], app._bodies.in_memory) == ("disconnected", 0)


async def test_a_bug_of_ours_is_a_500_that_says_nothing() -> None:
    def broken(*_):
        raise RuntimeError("a secret detail")

    records, contexts = [], []
    app, _ = gateway(recorder=Recorder(broken), log=records.append)
    asyncio.get_running_loop().set_exception_handler(lambda _, context: contexts.append(context))
    reply = await call(app, body=chat())
    assert reply.status == 500
    assert b"secret" not in reply.body
    assert records[0]["refused"] == "bug: RuntimeError"
    assert isinstance(contexts[0]["exception"], RuntimeError)


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


@pytest.mark.parametrize(("side", "beside"), [(40, False), (400, True)])
def test_no_step_over_a_large_picture_runs_in_the_loop(side, beside, monkeypatch) -> None:
    """JSON and base64 of megabytes take milliseconds, for each of a hundred that come at once."""
    in_loop = dict.fromkeys(("whole", "__init__", "hold", "finish"), True)

    def note(place: Any, name: str) -> None:
        act = getattr(place, name)

        def noted(*arguments: Any) -> Any:
            in_loop[name] = threading.current_thread() is threading.main_thread()
            return act(*arguments)

        monkeypatch.setattr(place, name, noted)

    note(body_module._Arrival, "whole")
    for name in ("__init__", "hold", "finish"):
        note(Preparation, name)
    file = BytesIO()
    Image.effect_noise((side, 2 * side), 90).save(file, "PNG")
    part = {"type": "image_url", "image_url": {"url": data_url(file.getvalue())}}
    app, recorder = gateway(engines=2)
    assert ask(app, body=chat(part)).status == 200
    assert recorder.bodies[0]["messages"][0]["content"][1]["image_url"]["url"].startswith("data:")
    assert set(in_loop.values()) == {not beside}


HELLO = [{"role": "user", "content": "Hello"}]
POSTED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": HELLO}),
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/messages", {"messages": HELLO, "max_tokens": 3}),
    ("/v1/messages/count_tokens", {"messages": HELLO}),
    ("/v1/responses", {"input": "a"}),
]
