"""Requests that lose their engine, by its death or otherwise, and what answers say of an engine."""

from __future__ import annotations

import asyncio
import math
import re
import time
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

import turbofit
from tests import virtual_time
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
    plan_for,
    stream,
)
from tests.support.waiting import auntil
from turbofit.core.plan import Plan
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.limits.gate import Cost, Gate
from turbofit.gateway.limits.request_limits import bounds_of
from turbofit.gateway.routing import request_forwarder
from turbofit.gateway.routing.engines import (
    Fleet,
    RoutedEngine,
    Turn,
)
from turbofit.gateway.routing.health import Monitor, healthy
from turbofit.gateway.server import make_gateway
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


def test_the_engine_that_one_more_request_fills_least_is_next() -> None:
    three = [RoutedEngine(i, "http://x", share, gate=Gate(5)) for i, share in enumerate((1, 1, 2))]
    fleet = Fleet(three)
    for _ in range(8):
        fleet.best(Cost()).outstanding += 1
    assert [engine.outstanding for engine in three] == [2, 2, 4], "by their shares"
    three[2].up = False
    assert fleet.best(Cost()) is three[0], "of equals the first"
    three[0].gate.counted = 5
    assert fleet.best(Cost()) is three[1], "the fewest units"
    three[0].up = False
    assert fleet.best(Cost(units=6)) is None, "it has no room"
    turn = Turn("a", together=2, alone=False)
    three[1].turns["its place"] = turn
    another, few = Turn("b", together=2, alone=False), Turn("c", together=1, alone=False)
    best = [fleet.best(Cost(), each) for each in (None, another, few)]
    assert (best, fleet.open) == ([three[1], three[1], None], 1)
    turn.together = 1
    assert fleet.best(Cost(), another) is None
    turn.alone = True
    assert fleet.best(Cost()) is None


def test_who_finds_no_engine_is_told_when_the_first_one_is_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    slow, fast = (RoutedEngine(i, "http://x") for i in range(2))
    fleet = Fleet([slow, fast])
    slow.start_seconds, fast.start_seconds = 200.0, 28.0
    assert fleet.retry_seconds == 5, "none has ended"
    slow.note_death()
    assert fleet.retry_seconds == 60, "no client waits longer"
    fast.note_death()
    assert fleet.retry_seconds == 30
    clock[0] += 29.5
    assert fleet.retry_seconds == 1
    clock[0] += 1
    assert fleet.retry_seconds == 60, "it is late, and the other one is expected later"
    slow.start_seconds = 1.0
    assert fleet.retry_seconds == 5, "both are late"
    fast.succeeded()
    assert fast.start_seconds == 30.5
    fast.note_death()
    fast.rested = True
    clock[0] += 600
    fast.succeeded()
    assert fast.start_seconds == 30.5, "it was left alone"


URLS = ["http://127.0.0.1:1", "http://127.0.0.1:2"]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return turbofit.plan("internvl2-8b-awq", on="rtx3090+rtx4080")


def test_engines_have_the_shares_of_their_cards(plan: Plan) -> None:
    gateway = make_gateway(plan, URLS, GatewayConfig())
    shares = [engine.share for engine in gateway.engines]
    assert shares == [group_plan.requests for group_plan in plan.engines]
    assert gateway.fleet.best(Cost()).share == max(shares)
    # Engines that were not planned take the same.
    for other, urls in ((plan, [*URLS, "http://127.0.0.1:3"]), (plan_for(), URLS)):
        gateway = make_gateway(other, urls, GatewayConfig())
        assert [engine.share for engine in gateway.engines] == [1.0] * len(urls)


def test_requests_are_held_to_the_poorest_card(plan: Plan) -> None:
    bounds = bounds_of(plan)
    longest, batches = zip(
        *((one.kv.longest_request_tokens, one.settings.max_batch_size) for one in plan.engines),
        strict=True,
    )
    assert (bounds.longest_request_tokens, bounds.limits.n) == (min(longest), min(batches))
    assert bounds.gate is None  # it is paid for on each card
    first, second = plan.engines
    poorer = replace(second, units_per_forward=20, requests=3)
    assert bounds_of(replace(plan, engines=(first, poorer))).gate == 20


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


#: Prometheus' client writes large numbers so, quotes what a label holds, and NaN for nothing.
PAGE = """\
lmdeploy:num_requests_running{model_name="m"} NaN
lmdeploy:prompt_tokens_total{model_name="a\\"} b"} 1.23456789e+08
lmdeploy:prompt_tokens_total{model_name="m"} %d
lmdeploy:generation_tokens_total{model_name="m"} %d
"""


@pytest.mark.parametrize("moves", [True, False])
async def test_an_engine_whose_tokens_still_count_is_slow_and_not_taken_out(moves) -> None:
    """Its probes fail, and nothing comes; its page tells of progress, or does not."""
    app, recorder = gateway(
        engines=1, recorder=Recorder(lambda *_: stream(3000.0, EVENT, DONE)),
        stall_seconds=100.0, probe_seconds=1.0,
    )  # fmt: skip
    count = iter(range(1, 10_000))

    async def page(*_):
        return PAGE % (next(count) if moves else 1, 1)

    recorder.page = page
    app.engines[0].succeeded()
    async with serving(app):
        recorder.works = False
        reply, up = await call(app, body=chat(stream=True)), app.engines[0].up
    assert (reply.status, up) == ((200, True) if moves else (503, False))


@asynccontextmanager
async def watching(engines, probe, **keywords):
    """A monitor of these engines, and a list with an item for each change that it told."""
    changed = []
    times = {"stall_seconds": 60.0, "retry_seconds": 0.0, "probe_seconds": 0.05, **keywords}
    upstream = SimpleNamespace(probe=probe)
    monitor = Monitor(engines, upstream, GatewayConfig(**times), lambda: changed.append(1))
    monitor.start()
    yield monitor, changed
    await monitor.stop()


async def test_three_failed_probes_take_an_engine_out_and_one_success_brings_it_back() -> None:
    """What a probe raises, a cancellation of something else too, does not end the watch."""
    answers = [OSError(), asyncio.CancelledError(), False, False, False, False, True]
    all_engines, states = [RoutedEngine(0, "http://engine")], []

    async def probe(engine):
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        states.append((engine.up, healthy(all_engines)))
        return answer

    async with watching(all_engines, probe) as (_, changed):
        await auntil(lambda: not answers, "five questions")
        await virtual_time.settled()
    assert states == [(up, False) for up in (True, True, True, False, False)]
    assert (all_engines[0].up, healthy(all_engines), len(changed)) == (True, True, 2)


async def test_an_engine_that_owes_answers_but_is_silent_is_given_up() -> None:
    """The port lives, nothing ever comes: what waits for it must end."""
    recorder = Recorder(lambda *_: stream(b"data: 1\n\n", 600.0))
    recorder.works = False
    app, _ = gateway(recorder=recorder, idle_seconds=1e6)
    app.engines[0].succeeded()
    async with serving(app):
        streaming = asyncio.ensure_future(call(app, body=chat(stream=True)))
        await virtual_time.settled()
        recorder.answer = lambda *_: Answer(600.0)
        silent = await call(app, body=chat())
        dead, health = await call(app, body=chat()), await call(app, "/health")
        recorder.works = True
        await auntil(lambda: app.engines[0].up, "the engine to be back")
        back = await call(app, "/health")
    assert (await streaming).status == 200
    assert b'"engine_died"' in (await streaming).body
    assert [reply.status for reply in (silent, dead, health, back)] == [503, 503, 503, 200]
    assert dead.headers["retry-after"] == "5"


async def test_what_its_supervisor_doubts_gets_nothing_new_and_clients_hear_when() -> None:
    """An engine that gives no sign of life is ended in 20 s; its last start took 12."""
    recorder = Recorder(lambda *_: Answer(600.0))
    app, _ = gateway(recorder=recorder, hung_seconds=math.inf, idle_seconds=1e6)
    (engine,) = app.engines
    engine.succeeded()
    engine.start_seconds, recorder.works = 12.0, False
    async with serving(app):
        silent = asyncio.ensure_future(call(app, body=chat()))
        await asyncio.sleep(5.0)
        assert (engine.owes, engine.asked_at) == (True, time.monotonic() - 5.0)
        assert engine.silent_since == engine.asked_at
        app.doubt(0, time.monotonic() + 20.0)
        told = await call(app, body=chat())
        assert (told.status, told.headers["retry-after"]) == (503, "34")
        await asyncio.sleep(10.0)
        assert (await call(app, "/health")).headers["retry-after"] == "24"
        assert not silent.done()  # it ends with its engine
        recorder.works, recorder.answer = True, lambda *_: Answer(b"{}")
        await auntil(lambda: engine.up, "it to answer")
        assert (engine.ends_at, (await call(app, body=chat())).status) == (math.inf, 200)
        silent.cancel()


async def test_failing_answers_make_the_gateway_ask() -> None:
    """After an out-of-memory of the PyTorch engine every request is a 503 and its health is 200."""
    app, recorder = gateway(
        recorder=Recorder(lambda *_: Answer(b"{}", status=503)), retry_seconds=0.0
    )
    app.engines[0].succeeded()
    recorder.works = False
    async with serving(app):
        assert (await call(app, CHAT, chat())).status == 503
        await auntil(lambda: not app.engines[0].up, "the engine to be given up")
        assert (await call(app, "/health")).status == 503
    assert recorder.probes >= 3
