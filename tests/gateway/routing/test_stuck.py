"""What is stuck, and what is slow, by the engine's own numbers."""

from __future__ import annotations

import asyncio

import pytest

from tests.gateway.routing.dying_engines import serving
from tests.support.gateway import DONE, EVENT, Recorder, call, chat, gateway, stream
from turbofit.gateway.routing.health import EngineLoad, engine_load, stuck_requests

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
    found = stuck_requests([silent, *others], load, 1000, 120)
    assert found == ({silent} if stuck else set())


def test_who_was_heard_of_is_not_silent() -> None:
    found = stuck_requests([Waiting(900, True), Waiting(1000, True)], BUSY, 1000, 120)
    assert found == set()


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
