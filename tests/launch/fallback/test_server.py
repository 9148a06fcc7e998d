"""The fallback's server, really serving tiny models on the CPU, and over a stand-in."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from tests import virtual_time
from tests.launch.fallback.support import KEY, NAME, OMNI_MAP, Served, tiny_omni, tiny_qwen2_vl
from tests.support.serving import image
from tests.support.waiting import HANG, until
from turbofit.gateway.config import GatewayConfig
from turbofit.launch.fallback.server import FallbackApp, GenerationOptions, ServedModel

CHAT = "/v1/chat/completions"
_MISSING = any(find_spec(name) is None for name in ("transformers", "accelerate", "fastapi"))


def needs_transformers(test):
    """Marks a test of Transformers' own server."""
    skips = pytest.mark.skipif(_MISSING, reason="needs Transformers' server")
    return pytest.mark.lmdeploy(skips(test))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    server = Served(tiny_qwen2_vl(tmp_path_factory.mktemp("tiny") / "Qwen2-VL"))
    yield server
    server.stop()


def post(served, body, path=CHAT, key=KEY, method="POST"):
    """A connection on which this was asked."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=HANG)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, body=data, headers=headers)
    return connection


def ask(served, *given, **more):
    connection = post(served, *given, **more)
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    kind = response.headers["content-type"] or ""
    return response.status, raw.decode() if "event-stream" in kind else json.loads(raw)


def chat(*parts, **more):
    content = [{"type": "text", "text": "What is this?"}, *parts]
    return {
        "model": NAME, "messages": [{"role": "user", "content": content}], "max_tokens": 4,
        "temperature": 0, **more,
    }  # fmt: skip


@needs_transformers
def test_routes_and_keys(served):
    assert ask(served, None, "/health", key="another", method="GET") == (200, {"status": "ok"})
    status, models = ask(served, None, "/v1/models", method="GET")
    assert (status, [model["id"] for model in models["data"]]) == (200, [NAME])
    status, answer = ask(served, chat(), key="another")
    assert (status, answer["error"]["type"]) == (401, "authentication_error")
    for path in ("/load_model", "/reset", "/v1/responses", "/docs", "/generate"):
        assert ask(served, {"model": NAME}, path)[0] == 404


@needs_transformers
@pytest.mark.parametrize("name", ["served", "omni"])
def test_text_and_image(name, request):
    server = request.getfixturevalue(name)
    status, text = ask(server, chat())
    assert (status, text["model"]) == (200, NAME)
    status, seen = ask(server, chat(image(56, 56)))
    assert status == 200, seen
    # 56 x 56 pixels are 16 patches of 14, 4 tokens, and the two tokens around them.
    assert seen["usage"]["prompt_tokens"] == text["usage"]["prompt_tokens"] + 4 + 2
    assert 1 <= seen["usage"]["completion_tokens"] <= 4
    status, two = ask(server, chat(image(56, 56), image(112, 56)))
    assert two["usage"]["prompt_tokens"] == seen["usage"]["prompt_tokens"] + 8 + 2
    status, events = ask(server, chat(image(56, 56), stream=True))
    assert status == 200, events
    assert events.rstrip().endswith("data: [DONE]")


@needs_transformers
def test_unknown_keys_are_ignored_and_answers_are_as_long_as_asked(served):
    body = chat(mm_processor_kwargs={"max_pixels": 1}, top_k=5, repetition_penalty=1.0, n=1)
    assert ask(served, body)[0] == 200
    body = {**chat(), "max_completion_tokens": 3}
    del body["max_tokens"]
    assert ask(served, body)[1]["usage"]["completion_tokens"] <= 3
    body = {"model": NAME, "prompt": "a", "max_tokens": 1, "temperature": 0}
    status, answer = ask(served, body, "/v1/completions")
    assert (status, answer["usage"]["prompt_tokens"]) == (200, 1)
    for prompt, status in ((["a"], 200), (["a", "b"], 400)):
        assert ask(served, {**body, "prompt": prompt}, "/v1/completions")[0] == status


@needs_transformers
def test_streams_end_as_clients_expect(served):
    status, body = ask(served, chat(image(56, 56), stream=True))
    assert status == 200
    events = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    assert choices[-1]["finish_reason"] in ("length", "stop")
    said = "".join(choice["delta"].get("content") or "" for choice in choices)
    plain = ask(served, chat(image(56, 56)))[1]["choices"][0]["message"]["content"].rstrip("\ufffd")
    # A character that the last token cut short is in one of them only.
    assert said == plain[: len(said)]
    assert len(said) >= len(plain)


@needs_transformers
def test_a_long_prompt_is_refused_and_an_answer_ends_with_the_context(served):
    long = {"type": "text", "text": "a" * 600}
    for stream in (False, True):
        status, answer = ask(served, chat(long, stream=stream))
        assert (status, "512" in answer["error"]["message"]) == (400, True)
    body = chat({"type": "text", "text": "a" * 440}, max_tokens=100_000)
    assert ask(served, body)[1]["usage"]["total_tokens"] <= 512


@needs_transformers
@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b"{", 400, "JSON"),
        ({"model": "another", "messages": []}, 404, "another"),
        ({"model": NAME, "messages": []}, 400, "messages"),
        ({"model": NAME, "messages": [{"role": "user", "content": [{"type": "audio"}]}]},
         400, "audio"),
        (chat(n=2), 400, "one request"),
        (chat(temperature=-1), 400, "temperature"),
        (chat(image(56, 56), image(56, 56), image(56, 56)), 400, "3 images"),
        (chat({"type": "image_url", "image_url": {"url": "/etc/passwd"}}), 400, "inline"),
        (chat({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}),
         415, "no known type"),
        (chat({"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}),
         400, "base64"),
        (chat({"type": "image_url", "image_url": {"url": image(56, 56)["image_url"]["url"][:80]}}),
         400, "header"),
        (chat(logit_bias={"five": 1}), 400, "logit_bias"),
    ],
)  # fmt: skip
def test_bad_requests_have_a_clean_answer(served, body, status, word):
    found, answer = ask(served, body)
    assert (found, word in answer["error"]["message"]) == (status, True), answer
    assert ask(served, chat())[0] == 200


@needs_transformers
def test_two_requests_are_served_one_after_the_other(served, monkeypatch):
    from transformers import Qwen2VLForConditionalGeneration as Model

    within, most, lock, generate = 0, 0, threading.Lock(), Model.generate

    def counted(*args, **kwargs):
        nonlocal within, most
        with lock:
            within += 1
            most = max(most, within)
        assert not served.model.idle.is_set()
        try:
            return generate(*args, **kwargs)
        finally:
            within -= 1

    monkeypatch.setattr(Model, "generate", counted)
    with ThreadPoolExecutor(3) as pool:
        bodies = [chat(image(56, 56), max_tokens=20)] * 3
        answers = list(pool.map(lambda body: ask(served, body), bodies))
    assert [status for status, _ in answers] == [200] * 3
    assert len({answer["choices"][0]["message"]["content"] for _, answer in answers}) == 1
    assert (most, within) == (1, 0)


@needs_transformers
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_work(served, stream, monkeypatch):
    tokens, begun = [], threading.Event()
    ends = served.model._ends

    def token(*args, **kwargs):
        tokens.append(1)
        if len(tokens) == 5:
            begun.set()
            served.model.cancelled.wait(HANG)
        return ends(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(served.model, "_ends", token, raising=False)
        connection = post(served, chat(max_tokens=400, logit_bias={"258": -100}, stream=stream))
        assert begun.wait(HANG)
        assert served.model.health == "ok"
        connection.sock.close()
        connection.close()
        assert served.model.idle.wait(HANG)
        assert 5 <= len(tokens) < 10
    assert ask(served, chat())[0] == 200


@needs_transformers
def test_out_of_memory_is_answered_and_the_engine_lives(served, monkeypatch):
    import torch
    from transformers import Qwen2VLForConditionalGeneration as Model

    def short(*_, **__):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate "2.00 GiB".\nx')

    with monkeypatch.context() as patch:
        patch.setattr(Model, "generate", short)
        assert served.model.fatal == ""
        for stream in (False, True):
            status, answer = ask(served, chat(stream=stream))
            assert (status, "Tried to allocate" in answer["error"]["message"]) == (503, True)
        assert served.ended == []
        ask(served, chat())
        until(lambda: served.ended, "the end of the engine")
        assert served.ended[0].startswith("torch.OutOfMemoryError: CUDA out of memory.")
    served.model.fatal, served.ended[:] = "", []
    assert ask(served, chat())[0] == 200


@needs_transformers
@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_before_or_in_the_model_leaves_the_engine_free(served, monkeypatch, stream):
    from transformers import Qwen2VLForConditionalGeneration as Model
    from transformers.cli.serving.utils import InferenceThread

    def broken(*_, **__):
        raise RuntimeError("Expected all tensors to be on the same device")

    for kind, names in ((InferenceThread, ("submit", "async_submit")), (Model, ("generate",))):
        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(kind, name, broken)
            status, answer = ask(served, chat(stream=stream))
        assert (status, "on the same device" in answer["error"]["message"]) == (500, True)
        assert ask(served, chat())[0] == 200


@pytest.fixture(scope="module")
def omni(tmp_path_factory):
    server = Served(tiny_omni(tmp_path_factory.mktemp("omni")), placed=OMNI_MAP)
    yield server
    server.stop()


_HEADERS = [(b"content-type", b"application/json")]
_SCOPE = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": _HEADERS}


class Handler:
    """Fails within its first answer while the model goes on, as a parser of answers may."""

    def __init__(self, model: ServedModel) -> None:
        self.model, self.calls, self.together = model, 0, False

    async def handle_request(self, _body: Any, _request_id: str) -> Any:
        self.calls += 1
        self.together = self.together or not self.model.idle.is_set()
        return SimpleNamespace(body_iterator=self._events(self.calls))

    async def _events(self, call: int) -> AsyncIterator[str]:
        yield "data: {}\n\n"
        if call == 1:
            self.model.start()
            raise KeyError("a tool call that cannot be parsed")


async def _asked(app: FallbackApp) -> bytes:
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    given: asyncio.Queue[Any] = asyncio.Queue()
    given.put_nowait({"type": "http.request", "body": body, "more_body": False})
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await app(dict(_SCOPE), given.get, send)
    assert sent[0]["status"] == 200
    return b"".join(message["body"] for message in sent[1:])


def test_the_next_request_waits_until_a_failed_one_generates_no_more() -> None:
    model = ServedModel(None, 64)
    handler = Handler(model)
    options = GenerationOptions("m", "m", {}, "float32", 64)

    async def both() -> None:
        app = FallbackApp({"completions": handler}, model, options, GatewayConfig(), lambda _: None)
        first = asyncio.ensure_future(_asked(app))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(_asked(app))
        await asyncio.sleep(60)  # virtual
        assert model.cancelled.is_set()  # nobody reads what it generates
        assert handler.calls == 1
        model.idle.set()  # the model's thread has seen it
        failed = await first
        assert b'"code":"engine_failed"' in failed
        assert failed.endswith(b"data: [DONE]\n\n")
        assert await second == b"data: {}\n\ndata: [DONE]\n\n"

    virtual_time.run(both())
    assert (handler.calls, handler.together) == (2, False)
