"""What is stuck, what is slow, and what becomes of the requests of an engine that is given up."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from tests import virtual_time
from tests.gateway.routing.dying_engines import metric, serving
from tests.support.gateway import CHAT, DONE, EVENT, Answer, Recorder, call, chat, gateway, stream
from tests.support.waiting import HANG, auntil
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.routing.engines import RoutedEngine
from turbofit.gateway.routing.health import (
    EngineLoad,
    Monitor,
    engine_load,
    healthy,
    stuck_requests,
)
from turbofit.gateway.upstream import Unreachable


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
    both = [
        asyncio.ensure_future(call(app, body=chat({"type": "text", "text": text})))
        for text in ("one", "two")
    ]
    await auntil(lambda: app.engines[0].outstanding == 2, "both to connect")
    for one, event in zip(both, refused, strict=True):
        event.set()
        await asyncio.wait((one,), timeout=HANG)
    replies = [(await one).status for one in both]
    assert (replies, app.deny_list.suspected) == ([200, 200], 0)
    assert metric(await call(app, "/metrics"), "retried_total") == 0
    assert [(one.up, one.outstanding) for one in app.engines] == [(False, 0), (True, 0), (True, 0)]


async def test_an_answer_of_the_process_that_died_meanwhile_brings_nothing_back() -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def probe(_: RoutedEngine) -> bool:
        asked.set()
        await answer.wait()
        return True

    engine = RoutedEngine(0, "http://engine")
    monitor = Monitor([engine], SimpleNamespace(probe=probe), GatewayConfig(), lambda: None)
    monitor.start()
    await asyncio.wait_for(asked.wait(), HANG)
    engine.note_death()
    answer.set()
    await auntil(lambda: not monitor._asking, "the answer")
    before = engine.answered
    await asyncio.sleep(0)
    await monitor.stop()
    assert before is False


PAGE = """\
lmdeploy:num_requests_running{model_name="m"} %d
lmdeploy:num_requests_waiting{model_name="m"} %d
lmdeploy:num_api_requests_waiting{model_name="m"} %d
lmdeploy:prompt_tokens_total{model_name="m"} %d
lmdeploy:generation_tokens_total{model_name="m"} %d
"""
IDLE, BUSY = EngineLoad(running=0, queued=0, tokens=1), EngineLoad(running=2, queued=0, tokens=1)
QUEUED = EngineLoad(running=2, queued=1, tokens=1)


class Waiting:
    def __init__(self, heard_at: float, begun: bool) -> None:
        self.heard_at, self.begun = heard_at, begun


def test_an_engine_s_page() -> None:
    assert engine_load(PAGE % (3, 1, 1, 100, 20)) == EngineLoad(running=3, queued=2, tokens=120)
    assert engine_load("") is None
    assert engine_load("# nothing of ours\nup 1\n") is None


@pytest.mark.parametrize(
    ("silent_begun", "others_at", "load", "stuck"),
    [
        (True, 1000, BUSY, True), (True, 1000, None, True), (True, 1000, QUEUED, False),
        (True, None, BUSY, False), (True, 820, BUSY, False), (False, 1000, BUSY, False),
        (False, 1000, QUEUED, False), (False, None, IDLE, True), (False, None, None, False),
    ],
)  # fmt: skip
def test_stuck_or_slow(silent_begun, others_at, load, stuck) -> None:
    """Silent since 800, now is 1000, and 120 seconds are too many."""
    silent = Waiting(800, silent_begun)
    others = [] if others_at is None else [Waiting(others_at, True)]
    result = stuck_requests([silent, *others], load, 1000, 120)
    assert result == ({silent} if stuck else set())


def test_who_was_heard_of_is_not_silent() -> None:
    result = stuck_requests([Waiting(900, True), Waiting(1000, True)], BUSY, 1000, 120)
    assert result == set()


async def run_with(pages, *, tokens: int):
    """A stream that stops after its first event, beside one of so many tokens, one a second."""

    def answer(engine, path, body):
        if b"stops" in body:
            return stream(EVENT, 10_000.0, DONE)
        return stream(*[part for _ in range(tokens) for part in (EVENT, 1.0)], DONE)

    app, recorder = gateway(engines=1, recorder=Recorder(answer), stuck_seconds=60.0)
    recorder.pages = pages
    app.engines[0].succeeded()
    async with serving(app):
        body = chat({"type": "text", "text": "stops"}, stream=True)
        stops = asyncio.ensure_future(call(app, body=body))
        goes = await call(app, body=chat(stream=True))
        await asyncio.sleep(0)
        ended = stops.done()
        stops.cancel()
        (reply,) = await asyncio.gather(stops, return_exceptions=True)
    return ended, reply, goes, app


async def test_a_stream_that_gets_no_token_while_others_do_is_ended_and_suspected() -> None:
    ended, reply, goes, app = await run_with(PAGE % (1, 0, 0, 1, 1), tokens=300)
    assert ended
    assert b"stuck in this request" in reply.body
    assert (goes.status, goes.body.endswith(DONE)) == (200, True)
    assert app.deny_list.suspected == 1
    assert app.engines[0].up
    assert app.engines[0].serves


async def test_one_that_waits_in_the_engine_s_queue_is_not() -> None:
    ended, *_, app = await run_with(PAGE % (1, 1, 0, 1, 1), tokens=300)
    assert not ended
    assert app.deny_list.suspected == 0


@pytest.mark.parametrize("moves", [True, False])
async def test_an_engine_whose_tokens_still_count_is_slow_and_not_taken_out(moves) -> None:
    """Its probes fail, and nothing comes; its page tells of progress, or does not."""
    app, recorder = gateway(
        engines=1, recorder=Recorder(lambda *_: stream(3000.0, EVENT, DONE)),
        stall_seconds=100.0, probe_seconds=1.0,
    )  # fmt: skip
    count = iter(range(10_000))

    async def page(*_):
        return PAGE % (1, 0, 0, next(count) if moves else 1, 1)

    recorder.page = page
    app.engines[0].succeeded()
    async with serving(app):
        recorder.works = False
        reply, up = await call(app, body=chat(stream=True)), app.engines[0].up
    assert (reply.status, up) == ((200, True) if moves else (503, False))


def watched(engines, probe, **keywords):
    changed = []
    times = {"stall_seconds": 60.0, "retry_seconds": 0.0, "probe_seconds": 0.05, **keywords}
    upstream = SimpleNamespace(probe=probe)
    return Monitor(engines, upstream, GatewayConfig(**times), lambda: changed.append(1)), changed


async def test_three_failed_probes_take_an_engine_out_and_one_success_brings_it_back() -> None:
    all_engines, answers = [RoutedEngine(0, "http://engine")], [False, False, False, False, True]
    states: list[tuple[bool, bool]] = []

    async def probe(engine):
        states.append((engine.up, healthy(all_engines)))
        return answers.pop(0)

    monitor, changed = watched(all_engines, probe)
    monitor.start()
    await auntil(lambda: not answers, "five questions")
    await virtual_time.settled()
    await monitor.stop()
    up = all_engines[0].up
    fine = healthy(all_engines)
    assert [up for up, _ in states] == [True, True, True, False, False]
    assert not any(fine for _, fine in states)
    assert (up, fine, len(changed)) == (True, True, 2)


async def test_a_probe_that_never_ends_counts_as_failed() -> None:
    all_engines = [RoutedEngine(0, "http://engine")]

    async def probe(engine):
        await asyncio.Event().wait()
        return True

    monitor, _ = watched(all_engines, probe)
    monitor.start()
    await auntil(lambda: not all_engines[0].up, "the engine to be given up")
    await monitor.stop()
    assert all_engines[0].up is False


async def test_recent_traffic_is_proof_enough() -> None:
    all_engines, probed = [RoutedEngine(0, "http://engine")], []

    async def probe(engine):
        probed.append(1)
        return True

    all_engines[0].succeeded()
    monitor, _ = watched(all_engines, probe)
    monitor.start()
    await asyncio.sleep(59)
    before = healthy(all_engines), len(probed)
    await asyncio.sleep(2)
    await monitor.stop()
    assert (before, len(probed)) == ((True, 0), 1)


async def test_an_engine_that_owes_answers_but_is_silent_is_given_up() -> None:
    """The port lives, nothing ever comes: what waits for it must end."""
    recorder = Recorder(lambda *_: stream(b"data: 1\n\n", 600.0))
    recorder.works = False
    app, _ = gateway(recorder=recorder, idle_seconds=1e6)
    app.engines[0].succeeded()
    await app.startup()
    streaming = asyncio.ensure_future(call(app, body=chat(stream=True)))
    await virtual_time.settled()
    recorder.answer = lambda *_: Answer(600.0)
    silent = asyncio.ensure_future(call(app, body=chat()))
    streaming, silent = await asyncio.gather(streaming, silent)
    dead = await call(app, body=chat())
    health = await call(app, "/health")
    recorder.works = True
    await auntil(lambda: app.engines[0].up, "the engine to be back")
    back = await call(app, "/health")
    await app.shutdown()
    assert streaming.status == 200
    assert b'"engine_died"' in streaming.body
    assert streaming.done
    assert (silent.status, dead.status, health.status, back.status) == (503, 503, 503, 200)
    assert dead.headers["retry-after"] == "5"


async def test_failing_answers_make_the_gateway_ask() -> None:
    """After an out-of-memory of the PyTorch engine every request is a 503 and its health is 200."""
    recorder = Recorder(lambda *_: Answer(b"{}", status=503))
    app, _ = gateway(recorder=recorder, retry_seconds=0.0)
    app.engines[0].succeeded()
    recorder.works = False
    await app.startup()
    first = await call(app, CHAT, chat())
    await auntil(lambda: not app.engines[0].up, "the engine to be given up")
    health = await call(app, "/health")
    await app.shutdown()
    assert (first.status, health.status) == (503, 503)
    assert recorder.probes >= 3
