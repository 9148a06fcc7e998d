"""Requests that lose their engine, by its death or otherwise, and what answers say of an engine."""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager
from itertools import chain

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
    image_part,
    stream,
)
from tests.support.waiting import auntil
from tests.virtual_time import settled
from turbofit.gateway.routing import request_forwarder
from turbofit.gateway.routing.engines import RoutedEngine

POISON = "poison"
#: LMDeploy's answer where its PyTorch engine's loop has ended.
UNAVAILABLE = (
    b'{"message":"The inference engine is unavailable.","type":"server_error","code":503,'
    b'"param":null,"object":"error"}'
)


class DyingEngines:
    """Engines that hold every request until `release`, and die of a poisonous one.

    As a process does: all that it had breaks off, and nothing listens any more. Or only as a
    PyTorch engine's loop: its server answers for it, once and for all.
    """

    def __init__(self, engines: int, *, loops: bool = False) -> None:
        self.app, self.recorder = gateway(engines=engines, recorder=Recorder(self._answer))
        for engine in self.app.engines:
            engine.succeeded()
        self._waiting: dict[int, list[asyncio.Future[None]]] = {n: [] for n in range(engines)}
        #: Each request with the engine that had it.
        self.received: list[tuple[int, str]] = []
        self._released, self._loops = False, loops
        self.dead = self.recorder.failing if loops else self.recorder.down

    async def _answer(self, engine, path, body):
        if engine.index in self.recorder.failing:
            return stream(b'data: {"error": ' + UNAVAILABLE + b"}\n\n", DONE)
        self.received.append((engine.index, str(body)))
        answered = asyncio.get_running_loop().create_future()
        self._waiting[engine.index].append(answered)
        if POISON in str(body):
            self.dead.add(engine.index)
            for other in self._waiting[engine.index]:
                other.set_exception(OSError("reset"))
        elif self._released:
            answered.set_result(None)
        try:
            await answered
        except OSError as exc:
            return Answer(UNAVAILABLE, status=503) if self._loops else exc
        return stream(EVENT, DONE)

    def release(self) -> None:
        """All that wait are answered, and those to come at once."""
        self._released = True
        for answered in chain(*self._waiting.values()):
            if not answered.done():
                answered.set_result(None)

    async def send(self, text: str) -> asyncio.Task:
        """A request that is at an engine from now on."""
        body = chat({"type": "text", "text": text}, stream=True)
        task = asyncio.ensure_future(call(self.app, body=body))
        await settled()
        return task

    def times(self, text: str) -> list[int]:
        """The engines that had a request, in order of their numbers."""
        return sorted(index for index, body in self.received if f'"{text}"' in body)


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


def test_engines_that_are_not_reached_do_not_count() -> None:
    recorder = Recorder(lambda *_: stream(EVENT))
    recorder.down = {0, 1, 2, 3, 4}
    app, _ = gateway(engines=6, recorder=recorder)
    assert ask(app, body=chat()).body == EVENT
    assert [engine.up for engine in app.engines] == [False] * 5 + [True]


async def test_who_waits_where_nothing_listens_any_more_waits_on() -> None:
    mortal = DyingEngines(2)
    waiting = await mortal.send("innocent")
    mortal.app.monitor.doubt(mortal.app.engines[0])
    mortal.release()
    assert (await waiting).status == 200
    assert mortal.times("innocent") == [0]
    assert not mortal.app.engines[0].up


async def test_a_body_is_forgotten_once_an_engine_begins_to_answer() -> None:
    app, _ = gateway(engines=2, recorder=Recorder(lambda *_: stream(0.05, EVENT, DONE)))
    pending = asyncio.ensure_future(call(app, body=chat(image_part(), stream=True)))
    await settled()
    assert (app.engines[0].outstanding, app._bodies.in_memory) == (1, 0)
    await pending


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


@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize("engines", [1, 8])
async def test_what_an_engine_had_when_it_died_is_sent_to_no_other(engines, loops) -> None:
    mortal = DyingEngines(engines, loops=loops)
    crowd = [await mortal.send(f"innocent {number}") for number in range(3 * engines)]
    reply = await (await mortal.send(POISON))
    mortal.release()
    beside = await asyncio.gather(*crowd)
    after = [await (await mortal.send("innocent after it"))] if engines > 1 else []
    assert (reply.status, reply.json["error"]["code"]) == (503, "engine_died")
    assert "retry-after" in reply.headers
    assert (len(mortal.dead), len(mortal.times(POISON))) == (1, 1)
    assert [reply.status for reply in after] == [200] * len(after)
    for number, other in enumerate(beside):
        (there,) = mortal.times(f"innocent {number}")
        assert other.status == (503 if there in mortal.dead else 200)
    assert [reply.status for reply in beside].count(503) == 3
    left = [(e.outstanding, e.units, e.host_bytes) for e in mortal.app.engines]
    assert left == [(0, 0, 0)] * engines
    assert mortal.app._bodies.in_memory == 0


def test_who_meets_a_connection_that_a_dead_engine_kept_is_at_the_same_death() -> None:
    """It was sent just after the death; what dies seconds later is another process."""
    engine = RoutedEngine(0, "http://127.0.0.1:9000")
    death = engine.note_death()
    assert engine.note_death(engine.died_at + 0.01) is death
    assert engine.note_death(engine.died_at + 5) is not death


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
    assert b"broke off" in reply.body
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
    """However it comes in pieces."""
    whole = begun + end
    at = len(whole) if cut is None else len(begun) + cut
    parts = (whole[:at], whole[at:])
    app, _ = gateway(recorder=Recorder(lambda *_: stream(*filter(None, parts))))
    reply = ask(app, path, body=body)
    assert reply.status == 200
    assert reply.body.startswith(begun)
    rest = reply.body[len(begun) :]
    assert b"broke off" in rest
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
        assert b"broke off" in reply.body
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


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_client_that_reads_slowly_is_told_of_a_death_and_accused_of_it(leaves) -> None:
    """Whatever is said of its engine meanwhile; and though it leaves before it has read that."""
    recorder = Recorder(lambda *_: stream(EVENT, OSError("reset")))
    app, _ = gateway(engines=2, recorder=recorder)
    telling, reads, gone = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def slowly(scope, receive, send):
        async def wait(message):
            if b'"engine_died"' in message.get("body", b""):
                telling.set()
                await reads.wait()
            await send(message)

        await app(scope, receive, wait)

    pending = asyncio.ensure_future(call(slowly, body=chat(stream=True), leave=gone))
    await telling.wait()
    app.engines[0].abort_all()
    (gone if leaves else reads).set()
    await asyncio.wait((pending,))
    await auntil(lambda: app.deny_list.suspected == 2, "it to be accused")
    assert not app.engines[0].left
    assert [(engine.outstanding, len(engine.in_flight)) for engine in app.engines] == [(0, 0)] * 2
    assert leaves or (b'"engine_died"' in (await pending).body and (await pending).done)


def test_an_answer_that_is_too_large_is_no_death(monkeypatch) -> None:
    monkeypatch.setattr(request_forwarder, "_LARGEST_ANSWER", 1000)
    app, recorder = gateway(engines=2, recorder=Recorder(lambda *_: Answer(*[b"x" * 500] * 5)))
    reply = ask(app, body=chat(logprobs=True))
    assert (reply.status, reply.json["error"]["code"]) == (422, "answer_too_large")
    assert "ask for a stream" in reply.json["error"]["message"]
    assert recorder.answers[0].closed
    assert len(recorder.seen) == 1
    assert app.deny_list.suspected == 0
    assert [(e.up, e.outstanding, len(e.left)) for e in app.engines] == [(True, 0, 0)] * 2
    assert deaths(app, "engine_failures") == 0
