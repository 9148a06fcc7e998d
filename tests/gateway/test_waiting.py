"""Image requests that wait for room at an engine: for how long, and who does not."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from bench.common.gateway import (
    DONE,
    EVENT,
    Answer,
    Recorder,
    call,
    chat,
    gateway,
    image_part,
    plan_for,
    stream,
)
from tests import virtual_time
from tests.virtual_time import settled


@pytest.mark.parametrize(("batch", "meanwhile"), [(1, 2), (10**6, 1)])
def test_the_next_image_goes_on_at_the_first_token_unless_the_engine_may_evict(
    batch: int, meanwhile: int
) -> None:
    async def run() -> int:
        plan = plan_for(units_per_forward=13)
        plan = replace(plan, settings=replace(plan.settings, max_batch_size=batch))
        assert plan.may_evict() == (batch > 1)
        app, recorder = gateway(plan, recorder=Recorder(lambda *_: stream(EVENT, 0.3, EVENT)))
        big = chat(image_part(448, 5376), stream=True)
        pending = [asyncio.ensure_future(call(app, body=big)) for _ in range(2)]
        await settled()  # the first has begun to answer, and has not ended
        begun = len(recorder.seen)
        await asyncio.gather(*pending)
        assert len(recorder.seen) == 2
        return begun

    assert virtual_time.run(run()) == meanwhile


def test_clients_that_wait_in_line_may_leave() -> None:
    async def run():
        plan = plan_for(units_per_forward=13)
        app, recorder = gateway(plan, recorder=Recorder(lambda *_: stream(0.3, EVENT)))
        big, gone = chat(image_part(448, 5376)), asyncio.Event()
        first = asyncio.ensure_future(call(app, body=big))
        await settled()
        second = asyncio.ensure_future(call(app, body=big, leave=gone))
        await settled()
        waiting = app.admission.waiting
        gone.set()
        await second
        await first
        return waiting, app, recorder

    waiting, app, recorder = virtual_time.run(run())
    assert waiting == 1
    assert app.admission.waiting == 0
    assert len(recorder.seen) == 1


def test_units_are_given_back_at_the_first_byte_of_a_stream_and_at_the_end_otherwise() -> None:
    async def run(answer, **fields):
        plan = plan_for(units_per_forward=13)
        app, recorder = gateway(plan, recorder=Recorder(lambda *_: answer()))
        big = chat(image_part(448, 5376), **fields)
        calls = [asyncio.ensure_future(call(app, body=big)) for _ in range(2)]
        await settled()
        early = len(recorder.seen)
        await asyncio.gather(*calls)
        return early

    assert virtual_time.run(run(lambda: stream(EVENT, 0.3, DONE), stream=True)) == 2
    assert virtual_time.run(run(lambda: stream(0.3, EVENT, DONE), stream=True)) == 1
    assert virtual_time.run(run(lambda: Answer(0.3, b"{}"))) == 1


def test_a_long_wait_ends_with_429() -> None:
    async def run():
        plan = plan_for(units_per_forward=13)
        slow = Recorder(lambda *_: Answer(0.4, b"{}"))
        app, _ = gateway(plan, recorder=slow, queue_seconds=0.1)
        big = chat(image_part(448, 5376))
        return await asyncio.gather(*(call(app, body=big) for _ in range(2)))

    good, busy = virtual_time.run(run())
    assert (good.status, busy.status) == (200, 429)
    assert int(busy.headers["retry-after"]) >= 1
    assert busy.json["error"]["type"] == "rate_limit_error"


def test_text_never_waits_behind_images() -> None:
    async def run():
        plan = plan_for(units_per_forward=13)
        app, recorder = gateway(plan, recorder=Recorder(lambda *_: Answer(0.2, b"{}")))
        bodies = [chat(image_part(448, 5376)), chat(image_part(448, 5376)), chat(), chat()]
        calls = [asyncio.ensure_future(call(app, body=body)) for body in bodies]
        await settled()
        early = len(recorder.seen)
        await asyncio.gather(*calls)
        return early

    assert virtual_time.run(run()) == 3
