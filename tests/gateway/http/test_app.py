"""The app: what passes, what is refused in which form, and what is recorded."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from io import BytesIO
from pathlib import Path
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
from turbofit.core.errors import UsageError
from turbofit.gateway.http import body as body_module
from turbofit.gateway.http.metrics import AccessLog, access_log, merge
from turbofit.gateway.http.prepare import Preparation
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.http.routes import ROUTES, api_of, find_route, hold_name

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


def test_keys() -> None:
    app, upstream = gateway(api_key=("one", "two"))
    assert ask(app, "/health").status == ask(app, "/health/").status == 503
    assert ask(app, "/healthy").status == 401
    wrong = ({"authorization": "Bearer no"}, {"authorization": "two"}, {"x-api-key": ""})
    for headers in ({}, *wrong):
        reply = ask(app, body=chat(), headers=headers)
        assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    for path in ("/v1/nothing", "/metrics", "/v1/models/"):
        assert ask(app, path).status == 401
    assert upstream.seen == []
    for headers in ({"authorization": "Bearer two"}, {"x-api-key": "one"}):
        assert ask(app, body=chat(), headers=headers).status == 200
    assert all("uthorization" not in key for *_, headers in upstream.seen for key in headers)


def test_web_pages_are_closed_out_unless_asked_for() -> None:
    app, upstream = gateway()
    reply = ask(app, body=chat(), headers={"origin": "https://evil.example"})
    assert reply.status == 403
    assert "--allow-origins https://evil.example" in reply.json["error"]["message"]
    reply = ask(app, body=chat(), headers={"origin": "https://" + "a" * 10_000})
    assert len(reply.json["error"]["message"]) < 300
    page = {"origin": "https://a.example"}
    assert ask(app, CHAT, method="OPTIONS", headers=page).status == 403
    assert ask(app, CHAT, method="OPTIONS").status == 405
    assert upstream.seen == []
    app, _ = gateway(allow_origins=("https://a.example",))
    reply = ask(app, CHAT, method="OPTIONS", headers=page)
    assert (reply.status, reply.headers["access-control-allow-methods"]) == (204, "GET, POST")
    reply = ask(app, body=chat(), headers=page)
    assert reply.headers["access-control-allow-origin"] == "https://a.example"
    assert ask(app, body=chat(), headers={"origin": "https://b.example"}).status == 403


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
    assert f"request {record['id']} is lowered: detail=high->12" in text
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
    assert reply.body == EVENT * 3 + DONE
    assert reply.chunks[:2] == [EVENT, EVENT + EVENT]
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
    assert reply.json["error"]["code"] == "engine_died"
    assert app.engines[0].outstanding == 0


async def test_a_client_that_goes_away_stops_the_engine() -> None:
    records: list[dict] = []
    answer, gone = stream(EVENT, 30.0, DONE), asyncio.Event()
    app, _ = gateway(recorder=Recorder(lambda *_: answer), log=records.append)
    asyncio.get_running_loop().call_later(0.05, gone.set)
    await asyncio.wait_for(call(app, body=chat(stream=True), leave=gone), 2)
    assert answer.closed
    assert (app.engines[0].outstanding, app.engines[0].units) == (0, 0)
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


def test_metrics_are_the_engines_and_our_own() -> None:
    app, recorder = gateway(engines=2)
    recorder.pages = '# HELP a b\n# TYPE a gauge\na 1\na{x="y"} 2\n'
    assert ask(app, body=chat(image_part(detail="high"))).status == 200
    assert ask(app, body=chat(*[image_part()] * 27)).status == 400
    text = ask(app, "/metrics").body.decode()
    lines = text.splitlines()
    assert lines.count("# TYPE a gauge") == 1
    for line in (
        'a{engine="0"} 1', 'a{engine="1",x="y"} 2',
        'turbofit_gateway_limited_total{what="detail"} 1',
        'turbofit_gateway_refused_total{reason="too_many_images"} 1',
        'turbofit_gateway_units_in_flight{engine="0"} 0',
        "# TYPE turbofit_gateway_kv_tokens_reserved gauge",
        'turbofit_gateway_requests_total{route="/v1/chat/completions",status="200"} 1',
        "turbofit_gateway_images_total 1",
    ):  # fmt: skip
        assert line in lines, text


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


def test_pages_of_several_engines_become_one() -> None:
    page = """# HELP h Seconds.
# TYPE h histogram
h_bucket{le="1"} 3
h_sum 2.5
h_count 3
# HELP g x
# TYPE g gauge
g{path="a b{c}"} 1
bare 7
g2{} 4
"""
    lines = merge({0: page, 3: page}).splitlines()
    assert lines.count("# TYPE h histogram") == 1
    for line in (
        'h_bucket{engine="3",le="1"} 3', 'g{engine="0",path="a b{c}"} 1', 'bare{engine="3"} 7',
        'g2{engine="0"} 4',
    ):  # fmt: skip
        assert line in lines
    heads = [i for i, line in enumerate(lines) if line.startswith("h_")]
    assert heads == list(range(heads[0], heads[0] + 6))
    assert merge({}) == ""
    # LMDeploy's samples have ``engine``; Prometheus refuses a page with a label twice.
    page = 'n_total{engine="0",model_name="m,engine=0"} 4\nn_total{x="1",engine="2"} 5\n'
    assert merge({3: page}).splitlines() == [
        'n_total{engine="3",exported_engine="0",model_name="m,engine=0"} 4',
        'n_total{engine="3",x="1",exported_engine="2"} 5',
    ]
    assert merge({"a b": 'n{engine="0"} 1\n'}, "model") == 'n{model="a b",engine="0"} 1\n'


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


def test_after_the_end_of_its_gateway_it_keeps_nothing_and_fails_nobody(tmp_path: Path) -> None:
    """A restart after an engine's death begins a gateway, and with it a log of its own."""
    log = AccessLog(tmp_path / "access.log")
    app, _ = gateway(log=log)
    log({"b": "é"})
    asyncio.run(app.shutdown())
    log({"after": "the end"})
    assert json.loads((tmp_path / "access.log").read_text()) == {"b": "é"}


def test_where_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert access_log("none") is None
    to_stderr = access_log("-")
    assert to_stderr is not None
    to_stderr({"a": 1})
    assert json.loads(capsys.readouterr().err) == {"a": 1}
    kept = access_log(str(tmp_path / "log"))
    assert isinstance(kept, AccessLog)
    for number in (1, 2):
        kept({"a": number})
    kept.close()
    assert (tmp_path / "log").read_text() == '{"a": 1}\n{"a": 2}\n'
    with pytest.raises(UsageError, match="cannot be written"):
        access_log(str(tmp_path / "no" / "log"))


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
    assert ask(app, f"{listing}/m").status == 404
    assert upstream.seen == []


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
        words = str(reply.json)
        assert (reply.status, "--allowed-hosts evil.example" in words) == (421, True)
    assert upstream.seen == []
    reply = await call(app, path, method="HEAD", headers={"host": "localhost:23333"})
    assert reply.status != 421


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("[::1]", True), ("[::1]:23333", True), ("127.0.0.1:", True), ("localhost.:1", True),
        ("[::1].evil.com", False), ("[::1]evil.com:80", False), ("127.0.0.1:80.evil.com", False),
        ("127.0.0.1:1:2", False), ("[127.0.0.1", False), ("localhost:evil", False),
    ],
)  # fmt: skip
async def test_what_begins_like_an_address_is_none(host: str, known: bool) -> None:
    app, _ = gateway(names={"m": "m"})
    reply = await call(app, "/health", method="GET", headers={"host": host})
    assert (reply.status != 421) is known


async def test_its_own_page_may_ask_and_another_one_may_not() -> None:
    """A page that let its own name lead here has that name as `Host` too."""
    for config, host, status in (
        ({}, "127.0.0.1:23333", 200),
        ({}, "localhost:23333", 200),
        ({"host": "0.0.0.0"}, "10.0.0.7:23333", 200),
        ({"host": "0.0.0.0"}, "evil.example:23333", 403),
        ({"host": "0.0.0.0", "allowed_hosts": ("chat.example",)}, "chat.example", 200),
    ):
        app, _ = gateway(names={"m": "m"}, **config)
        headers = {"host": host, "origin": f"http://{host}"}
        assert (await call(app, CHAT, chat(), headers=headers)).status == status, host
        headers["origin"] = "http://evil.example"
        if "evil" not in host:
            assert (await call(app, CHAT, chat(), headers=headers)).status == 403
    app, _ = gateway(names={"m": "m"}, api_key=("k",))
    headers = {"host": "a.example", "origin": "https://a.example", "authorization": "Bearer k"}
    assert (await call(app, CHAT, chat(), headers=headers)).status == 200
