"""The fallback's server, really serving tiny models on the CPU, and over a stand-in."""

from __future__ import annotations

import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest

from tests.serving.fallback.support import KEY, NAME, OMNI_MAP, Served, tiny_omni, tiny_qwen2_vl
from tests.support.serving import image
from tests.support.waiting import HANG, until

CHAT = "/v1/chat/completions"
_MISSING = any(find_spec(name) is None for name in ("transformers", "accelerate"))


def needs_transformers(test):
    """Marks a test of a model of Transformers."""
    return pytest.mark.lmdeploy(pytest.mark.skipif(_MISSING, reason="needs Transformers")(test))


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
    assert ask(served, chat(temperature=0.7, top_p=0.9, top_k=5, seed=1 << 63))[0] == 200
    body = chat()
    del body["temperature"]  # the model's own way
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
    assert said == ask(served, chat(image(56, 56)))[1]["choices"][0]["message"]["content"]
    assert json.loads(events[-1])["usage"]["completion_tokens"] <= 4


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
        ({"model": NAME}, 400, "messages"),
        ({"model": NAME, "messages": [{"role": "user", "content": [{"type": "audio"}]}]},
         400, "audio"),
        (chat(n=2), 400, "one request"),
        (chat(temperature=-1), 400, "temperature"),
        (chat({"type": "image_url", "image_url": {"url": "/etc/passwd"}}), 400, "inline"),
        (chat({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}),
         415, "is unknown"),
        (chat({"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}),
         400, "base64"),
        (chat({"type": "image_url", "image_url": {"url": image(56, 56)["image_url"]["url"][:80]}}),
         400, "header"),
        (chat(logit_bias={"five": 1}), 400, "logit_bias"),
        (chat(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "calls no tools"),
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
    import torch
    from transformers import Qwen2VLForConditionalGeneration as Model

    tokens, gone, begun = [], [], threading.Event()
    answer, generate = served.model.generate, Model.generate

    def answers(kind, body, streamer, left):
        gone.append(left)
        return answer(kind, body, streamer, left)

    def generates(*args, stopping_criteria, **keywords):
        def token(ids, _scores, **_):
            tokens.append(1)
            if len(tokens) == 5:
                begun.set()
                gone[0].wait(HANG)
            return torch.zeros(ids.shape[0], dtype=torch.bool)

        stopping_criteria.insert(0, token)
        return generate(*args, stopping_criteria=stopping_criteria, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(served.model, "generate", answers)
        patch.setattr(Model, "generate", generates)
        connection = post(served, chat(max_tokens=400, logit_bias={"258": -100}, stream=stream))
        assert begun.wait(HANG)
        assert ask(served, None, "/health", method="GET")[0] == 200
        connection.sock.close()
        connection.close()
        assert gone[0].wait(HANG)
    assert ask(served, chat())[0] == 200
    assert len(tokens) == 5


@needs_transformers
def test_health_tells_that_no_token_comes(served, monkeypatch):
    monkeypatch.setattr(served.model, "moved", -1e9)
    assert ask(served, None, "/health", method="GET") == (503, {"status": "stalled"})


@needs_transformers
def test_out_of_memory_is_answered_and_the_engine_lives(served, monkeypatch):
    import torch
    from transformers import Qwen2VLForConditionalGeneration as Model

    def short(*_, **__):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate "2.00 GiB".\nx')

    assert ask(served, chat())[0] == 200
    with monkeypatch.context() as patch:
        patch.setattr(Model, "generate", short)
        for stream in (False, True):
            status, answer = ask(served, chat(stream=stream))
            assert (status, "Tried to allocate" in answer["error"]["message"]) == (503, True)
        assert served.ended == []
        # One that has never answered would do so for ever.
        patch.setattr(served.model, "_answered", False)
        ask(served, chat())
        until(lambda: served.ended, "the end of the engine")
        assert served.ended[0].startswith("torch.OutOfMemoryError: CUDA out of memory.")
    served.model.fatal, served.ended[:] = "", []
    assert ask(served, chat())[0] == 200


@needs_transformers
@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_before_or_in_the_model_leaves_the_engine_free(served, monkeypatch, stream):
    from transformers import Qwen2VLForConditionalGeneration as Model

    def broken(*_, **__):
        raise RuntimeError("Expected all tensors to be on the same device")

    processor = type(served.model._processor)
    for kind, name in ((processor, "apply_chat_template"), (Model, "generate")):
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, broken)
            status, answer = ask(served, chat(stream=stream))
        assert (status, "on the same device" in answer["error"]["message"]) == (500, True)
        assert ask(served, chat())[0] == 200


@needs_transformers
def test_a_stream_that_breaks_off_says_so(served, monkeypatch):
    from transformers import Qwen2VLForConditionalGeneration as Model

    def breaks(*_, streamer, **__):
        streamer.on_finalized_text("so far ")
        raise RuntimeError("an index out of bounds")

    monkeypatch.setattr(Model, "generate", breaks)
    status, events = ask(served, chat(stream=True))
    first, failed, done = events.split("\n\n")[:3]
    assert (status, done) == (200, "data: [DONE]")
    assert json.loads(first[6:])["choices"][0]["delta"]["content"] == "so far "
    assert json.loads(failed[6:])["error"]["code"] == "engine_failed"


@pytest.fixture(scope="module")
def omni(tmp_path_factory):
    server = Served(tiny_omni(tmp_path_factory.mktemp("omni")), placed=OMNI_MAP)
    yield server
    server.stop()
