"""What becomes of a request whose engine breaks off or ends, and of one still connecting to it."""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager

import pytest

from tests.support.gateway import (
    CHAT,
    DONE,
    EVENT,
    Answer,
    Recorder,
    ask,
    call,
    chat,
    gateway,
    stream,
)
from tests.support.waiting import auntil
from turbofit.gateway.routing import request_forwarder
from turbofit.gateway.upstream import Unreachable

#: LMDeploy's answer where its PyTorch engine's loop has ended.
UNAVAILABLE = (
    b'{"message":"The inference engine is unavailable.","type":"server_error","code":503,'
    b'"param":null,"object":"error"}'
)


def deaths(app, name: str = "engine_deaths") -> int:
    """A counter of the first engine."""
    page = ask(app, "/metrics").body.decode()
    found = re.search(rf'turbofit_gateway_{name}_total{{engine="0"}} (\d+)', page)
    return int(found[1]) if found else 0


@asynccontextmanager
async def serving(app):
    """The app watches its engines meanwhile."""
    await app.startup()
    try:
        yield
    finally:
        await app.shutdown()


async def test_an_engine_that_breaks_off_gets_nothing_new_until_it_answers() -> None:
    """It has nothing to do, so that it would be chosen first, again and again."""
    working = False

    def answer(engine, path, body):
        return stream(EVENT, DONE) if engine.index or working else OSError("reset")

    app, recorder = gateway(engines=2, recorder=Recorder(answer), retry_seconds=0.0)
    async with serving(app):
        replies = [await call(app, body=chat(stream=True, seed=n)) for n in range(20)]
        asked = [index for index, *_ in recorder.seen]
        working = True
        await auntil(lambda: app.engines[0].up, "the engine to be asked again")
    assert [reply.status for reply in replies] == [503] + [200] * 19
    assert asked.count(0) == 1


ANTHROPIC = {"model": "m", "max_tokens": 4, "messages": [{"role": "user", "content": "x"}]}
OPENAI_END = b'data: {"error": ' + UNAVAILABLE + b"}\n\n"
ANTHROPIC_END = (
    b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error",'
    b'"message":"The inference engine is unavailable."}}\n\n'
)
PREAMBLE = (
    b'event: response.created\ndata: {"type":"response.created"}\n\n'
    b'event: response.in_progress\ndata: {"type":"response.in_progress"}\n\n'
)
#: What LMDeploy 0.18 sends where nothing was generated.
EMPTY = b"".join(
    b"event: response." + name + b'\ndata: {"type":"response.' + name + b'"}\n\n'
    for name in (
        b"output_item.added", b"content_part.added", b"output_text.done", b"content_part.done",
        b"output_item.done",
    )
)  # fmt: skip
RESPONSES_END = (
    b'event: response.failed\ndata: {"type": "response.failed", "response": {"id": "r", "error": '
    b'{"code": "engine_unavailable", "message": "The inference engine is unavailable."}}}\n\n'
)
DELTA = b'event: response.output_text.delta\ndata: {"delta":"x"}\n\n'


@pytest.mark.parametrize(
    ("path", "body", "end"),
    [
        (CHAT, chat(stream=True), lambda: stream(OPENAI_END, DONE)),
        (CHAT, chat(), lambda: Answer(UNAVAILABLE, status=503)),
        ("/v1/messages", {**ANTHROPIC, "stream": True}, lambda: stream(ANTHROPIC_END)),
    ],
)
def test_what_was_not_begun_is_no_answer(path, body, end) -> None:
    app, recorder = gateway(recorder=Recorder(lambda *_: end()))
    reply = ask(app, path, body=body)
    assert (reply.status, reply.headers["retry-after"]) == (503, "5")
    assert b"ended before the answer" in reply.body
    assert deaths(app) == 1
    assert not app.engines[0].up
    assert len(recorder.seen) == 1


@pytest.mark.parametrize(
    ("path", "body", "begun", "end"),
    [
        (CHAT, chat(stream=True), EVENT, OPENAI_END + DONE),
        ("/v1/messages", {**ANTHROPIC, "stream": True}, b"event: x\ndata: {}\n\n", ANTHROPIC_END),
        ("/v1/responses", {"input": "x", "stream": True}, PREAMBLE + DELTA, RESPONSES_END),
    ],
)
@pytest.mark.parametrize("cut", [0, None, -1, 40, -2])
def test_what_was_begun_ends_with_an_error_event(path, body, begun, end, cut) -> None:
    whole = begun + end
    at = len(whole) if cut is None else len(begun) + cut
    parts = (whole[:at], whole[at:])
    app, _ = gateway(recorder=Recorder(lambda *_: stream(*filter(None, parts))))
    reply = ask(app, path, body=body)
    assert reply.status == 200
    assert reply.body.startswith(begun)
    rest = reply.body[len(begun) :]
    assert b"ended before the answer" in rest
    assert b"unavailable" not in rest
    assert rest.endswith(b"\n\n")
    assert deaths(app) == 1


def test_the_beginning_of_a_responses_stream_says_nothing_of_its_engine() -> None:
    for parts in [
        (PREAMBLE, EMPTY, RESPONSES_END), (PREAMBLE + EMPTY + RESPONSES_END,),
        (PREAMBLE[:50], PREAMBLE[50:], EMPTY[:70], EMPTY[70:], RESPONSES_END),
    ]:  # fmt: skip
        app, _ = gateway(recorder=Recorder(lambda *_, parts=parts: stream(*parts)))
        reply = ask(app, "/v1/responses", body={"input": "x", "stream": True})
        assert reply.body.startswith(PREAMBLE + EMPTY)
        assert b"ended before the answer" in reply.body
        assert deaths(app) == 1
        assert app.engines[0].last_success == float("-inf")
    app, _ = gateway(recorder=Recorder(lambda *_: stream(PREAMBLE, DELTA)))
    reply = ask(app, "/v1/responses", body={"input": "x", "stream": True})
    assert reply.body == PREAMBLE + DELTA
    assert app.engines[0].answered


#: What a model wrote, and an error that quotes it.
WRITTEN = b'data: {"choices":[{"delta":{"content":"The inference engine is unavailable."}}]}\n\n'
FORGED = (
    b'data: {"choices":[{"delta":{"content":"{\\"error\\": {\\"message\\": '
    b'\\"The inference engine is unavailable.\\"}}"}}]}\n\n'
)
QUOTED = (
    b'data: {"error": {"message": "Failed to parse output: The inference engine is unavailable.", '
    b'"code": 400}}\n\n'
)


@pytest.mark.parametrize(
    ("status", "part"),
    [
        (200, WRITTEN), (200, FORGED), (200, QUOTED),
        # What runs out of memory for one request, and lives.
        (503, b'{"error":{"message":"out of GPU memory"}}'),
    ],
)  # fmt: skip
def test_an_engine_that_lives_is_accused_of_nothing(status, part) -> None:
    kind = "text/event-stream" if status == 200 else "application/json"
    app, _ = gateway(recorder=Recorder(lambda *_: Answer(part, status=status, kind=kind)))
    reply = ask(app, body=chat(stream=True))
    assert (reply.status, reply.body) == (status, part)
    assert deaths(app) == 0
    assert app.engines[0].up


def test_an_answer_that_is_too_large_is_no_death(monkeypatch) -> None:
    monkeypatch.setattr(request_forwarder, "_LARGEST_ANSWER", 1000)
    app, recorder = gateway(engines=2, recorder=Recorder(lambda *_: Answer(*[b"x" * 500] * 5)))
    reply = ask(app, body=chat(logprobs=True))
    assert (reply.status, reply.json["error"]["code"]) == (422, "answer_too_large")
    assert "ask for a stream" in reply.json["error"]["message"]
    assert recorder.answers[0].closed
    assert len(recorder.seen) == 1
    assert app.deny_list.numbers == (0, 0)
    assert [(e.up, e.outstanding, len(e.left)) for e in app.engines] == [(True, 0, 0)] * 2
    assert deaths(app, "engine_failures") == 0


async def test_who_is_still_connecting_to_an_engine_that_has_ended_goes_to_another() -> None:
    """It was never sent: no engine died of it, though the connections fail one by one."""
    refused = [asyncio.Event(), asyncio.Event()]
    connecting = iter(refused)

    async def answer(engine, path, body):
        if engine.index == 0:
            await next(connecting).wait()
            raise Unreachable("refused")
        return Answer(b"{}")

    app, _ = gateway(engines=3, recorder=Recorder(answer))
    for engine in app.engines:
        engine.succeeded()
    app.engines[0].share = 1000.0  # the least busy one, whatever it has
    texts = ({"type": "text", "text": text} for text in ("one", "two"))
    both = [asyncio.ensure_future(call(app, body=chat(text))) for text in texts]
    await auntil(lambda: app.engines[0].outstanding == 2, "both to connect")
    for request, event in zip(both, refused, strict=True):
        event.set()
        assert (await request).status == 200
    assert app.deny_list.numbers == (0, 0)
    assert [(engine.up, engine.outstanding) for engine in app.engines] == [
        (False, 0), (True, 0), (True, 0),
    ]  # fmt: skip
