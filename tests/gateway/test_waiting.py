"""Image requests that wait for room at an engine: for how long, and who does not."""

from __future__ import annotations

import asyncio
from base64 import b64encode

import pytest
from msgspec.structs import replace

from tests import virtual_time
from tests.support.gateway import (
    DONE,
    EVENT,
    Answer,
    Recorder,
    call,
    chat,
    gateway,
    image_part,
    picture,
    plan_for,
    stream,
)
from tests.virtual_time import settled
from turbofit.core.plan import Plan

BIG = image_part(448, 5376)
BASE64 = b64encode(picture(448, 5376)).decode()
#: More than its tokens by what a text and a template may take, which nobody counts.
FEW_TOKENS = 4 * 13 * 256


def queued_plan(**kv: int) -> Plan:
    """A plan that pays for one image of 13 tiles, whose engine may evict."""
    plan = plan_for(units_per_forward=13)
    plan = replace(plan, kv=replace(plan.kv, **{"tokens": FEW_TOKENS, **kv}))
    plan = replace(plan, settings=replace(plan.settings, max_batch_size=1024))
    assert plan.may_evict()
    return plan


async def begun(plan: Plan, *bodies: object) -> int:
    """How many of these reach the engine before any of them has ended, all streams."""
    app, recorder = gateway(plan, recorder=Recorder(lambda *_: stream(EVENT, 0.3, EVENT)))
    calls = [asyncio.ensure_future(call(app, body=body)) for body in bodies]
    await settled()
    early = len(recorder.seen)
    await asyncio.gather(*calls)
    assert len(recorder.seen) == len(bodies)
    (engine,) = app.engines
    assert (engine.units, engine.host_bytes) == (0, 0)
    assert engine.gate is not None
    assert (engine.gate.counted, engine.gate.reserved) == (0, 0)
    return early


def test_where_no_engine_may_evict_the_next_image_goes_on_at_the_first_token() -> None:
    plan = plan_for(units_per_forward=13)
    assert not plan.may_evict()
    big = chat(BIG, stream=True)
    assert virtual_time.run(begun(plan, big, big)) == 2


def test_images_run_beside_each_other_where_the_cache_holds_what_they_state() -> None:
    short = chat(BIG, stream=True, max_tokens=64)
    assert virtual_time.run(begun(queued_plan(), short, short)) == 2
    assert virtual_time.run(begun(queued_plan(), *[short] * 5)) == 2
    assert virtual_time.run(begun(queued_plan(tokens=3 * FEW_TOKENS), *[short] * 5)) == 5


def test_an_image_whose_answer_is_not_stated_waits_for_the_end_of_the_one_before() -> None:
    short, long = chat(BIG, stream=True, max_tokens=64), chat(BIG, stream=True)
    assert virtual_time.run(begun(queued_plan(), long, long)) == 1
    assert virtual_time.run(begun(queued_plan(), short, long, short)) == 1


def test_text_waits_where_it_could_evict_images_that_run_beside_each_other() -> None:
    short, text = chat(BIG, stream=True, max_tokens=64), chat(stream=True)
    assert virtual_time.run(begun(queued_plan(), short, text)) == 2  # one image: it is paid for
    assert virtual_time.run(begun(queued_plan(), short, short, text)) == 2
    said = chat(stream=True, max_tokens=64)
    assert virtual_time.run(begun(queued_plan(), short, short, said)) == 3


async def test_the_metrics_page_says_what_is_reserved() -> None:
    app, _ = gateway(queued_plan(), recorder=Recorder(lambda *_: Answer(0.3, b"{}")))
    waiting = asyncio.ensure_future(call(app, body=chat(BIG, max_tokens=64)))
    await settled()
    during = (await call(app, "/metrics")).body.decode()
    await waiting
    after = (await call(app, "/metrics")).body.decode()
    name = 'turbofit_gateway_kv_tokens_reserved{engine="0"} '
    (reserved,) = (line.removeprefix(name) for line in during.splitlines() if name in line)
    # 13 tiles, the answer, 640 for the template, and a text of less than 600 bytes.
    assert 13 * 256 + 64 + 640 < int(reserved) < 13 * 256 + 64 + 640 + 600 + 3 * 64
    assert f"{name}0\n" in after


def test_the_name_of_the_answer_s_length_is_the_route_s() -> None:
    async def run(path: str, **stated: int) -> int:
        app, recorder = gateway(
            queued_plan(), recorder=Recorder(lambda *_: stream(EVENT, 0.3, EVENT))
        )
        source = {"type": "base64", "media_type": "image/png"}
        picture = {"type": "image", "source": {**source, "data": BASE64}}
        body = {"messages": [{"role": "user", "content": [picture]}], "model": "m"}
        bodies = [{**body, "stream": True, **stated} for _ in range(2)]
        calls = [asyncio.ensure_future(call(app, path, body=one)) for one in bodies]
        await settled()
        early = len(recorder.seen)
        await asyncio.gather(*calls)
        return early

    assert virtual_time.run(run("/v1/messages", max_tokens=64)) == 2
    assert virtual_time.run(run("/v1/messages", max_tokens=20_000)) == 1


@pytest.mark.parametrize(("streamed", "seconds"), [(True, 0.2), (False, 10.0)])
async def test_who_leaves_before_the_answer_is_counted_on_for_a_while(
    streamed: bool, seconds: float
) -> None:
    """LMDeploy notices that a client left at the next token of an answer in one piece."""
    gone, loop = asyncio.Event(), asyncio.get_running_loop()
    came: list[float] = []

    async def answer(*_: object) -> Answer:
        came.append(loop.time())
        return stream(EVENT, 60.0) if streamed and len(came) == 1 else Answer(60.0, b"{}")

    app, _ = gateway(queued_plan(), recorder=Recorder(answer))
    big = chat(BIG, stream=streamed)
    first = asyncio.ensure_future(call(app, body=big, leave=gone))
    await settled()
    second = asyncio.ensure_future(call(app, body=big))
    loop.call_later(0.2, gone.set)
    await first
    await second
    assert (came[1] - came[0]) == pytest.approx(seconds + 0.2 * (not streamed), abs=0.1)


async def test_clients_that_wait_in_line_may_leave() -> None:
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


async def test_a_long_wait_ends_with_429() -> None:
    plan = plan_for(units_per_forward=13)
    slow = Recorder(lambda *_: Answer(0.4, b"{}"))
    app, _ = gateway(plan, recorder=slow, queue_seconds=0.1)
    big = chat(image_part(448, 5376))
    (good, busy) = await asyncio.gather(*(call(app, body=big) for _ in range(2)))
    assert (good.status, busy.status) == (200, 429)
    assert int(busy.headers["retry-after"]) >= 1
    assert busy.json["error"]["type"] == "rate_limit_error"


async def test_text_never_waits_behind_images_where_the_cache_holds_it() -> None:
    plan = plan_for(units_per_forward=13)
    app, recorder = gateway(plan, recorder=Recorder(lambda *_: Answer(0.2, b"{}")))
    bodies = [chat(image_part(448, 5376)), chat(image_part(448, 5376)), chat(), chat()]
    calls = [asyncio.ensure_future(call(app, body=body)) for body in bodies]
    await settled()
    early = len(recorder.seen)
    await asyncio.gather(*calls)
    assert early == 3
