"""The app: streams, engines that die, clients that leave, and bugs of our own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

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
    gateway,
    picture,
    stream,
)

ANTHROPIC = anthropic(picture(448, 5376))


async def test_streams_pass_event_by_event() -> None:
    long = b"data: " + b"x" * (1 << 20)  # too long to be kept until its end
    parts = (EVENT, EVENT[:9], EVENT[9:] + EVENT, 0.02, long, 0.02, b"\n\n" + DONE)
    app, _ = gateway(recorder=Recorder(lambda *_: stream(*parts)))
    reply = await call(app, body=chat(stream=True))
    assert (reply.body, reply.chunks[:3]) == (
        EVENT * 3 + long + b"\n\n" + DONE,
        [EVENT, EVENT + EVENT, long],
    )
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


HELLO = [{"role": "user", "content": "Hello"}]
POSTED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": HELLO}),
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/messages", {"messages": HELLO, "max_tokens": 3}),
    ("/v1/messages/count_tokens", {"messages": HELLO}),
    ("/v1/responses", {"input": "a"}),
]
