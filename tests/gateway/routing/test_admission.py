"""Who has a place at an engine, who waits for one; no forward has more units than the gate."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from tests.support.gateway import (
    CHAT,
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
from tests.support.plans import changed
from tests.virtual_time import settled
from turbofit.core.plan import Plan
from turbofit.gateway.limits.gate import Cost, Gate
from turbofit.gateway.routing.admission import Admission
from turbofit.gateway.routing.engines import Fleet, RoutedEngine


async def test_one_client_may_fill_the_queue_and_makes_room_for_the_others() -> None:
    """Its newest requests go, and only until each client has as many places as the others."""
    engine = RoutedEngine(0, "http://e0", host_limit=1)
    door = Admission(Fleet([engine]), longest=8)
    engine.host_bytes = 1  # of another one

    async def ask(client: str, count: int) -> list[asyncio.Task]:
        cost = Cost(host_bytes=1)
        tasks = [asyncio.ensure_future(door.admit(client, cost)) for _ in range(count)]
        await settled()
        return tasks

    many = await ask("many", 9)
    assert [task.done() for task in many] == [False] * 8 + [True]
    few, (third,) = await ask("few", 5), await ask("third", 1)
    # Four places each; the third client's comes from one of the two.
    assert [task.done() for task in many] == [False] * 3 + [True] * 6
    assert [task.done() for task in few] == [False] * 4 + [True]
    assert (third.done(), door.waiting) == (False, 8)
    errors = [task.exception() for task in (*many, *few) if task.done()]
    assert {(error.status, error.reason) for error in errors} == {(429, "busy")}
    for task in (*many, *few, third):
        task.cancel()
    await settled()
    assert (door.waiting, door._queue.lines) == (0, {})


async def test_a_bound_of_all_engines_lets_the_next_in_once_one_has_ended() -> None:
    """As LMDeploy's --max-concurrent-requests: the rest waits, and is not refused."""
    door = Admission(Fleet([RoutedEngine(n, f"http://e{n}") for n in range(2)]), at_once=3)
    tasks = [asyncio.ensure_future(door.admit(f"client {n}", Cost())) for n in range(5)]
    await settled()
    assert ([task.done() for task in tasks], door.waiting) == ([True] * 3 + [False] * 2, 2)
    tasks[1].result().leave()
    await settled()
    assert ([task.done() for task in tasks], door.waiting) == ([True] * 4 + [False], 1)
    tasks[4].cancel()
    await settled()
    for task in tasks[:4:2]:
        task.result().leave()
    tasks[3].result().leave()
    assert (door.under_way, door.waiting) == (0, 0)


def engines(count: int = 1, gate=10, host_limit=10**9) -> list[RoutedEngine]:
    return [
        RoutedEngine(index, f"http://e{index}", gate=Gate(gate), host_limit=host_limit)
        for index in range(count)
    ]


async def served(asked: str) -> list[str]:
    """In which order clients come to the engine, one letter each, who ask for all of it or less."""
    all_engines, order = engines(), []
    door = Admission(Fleet(all_engines))

    async def ask_for(client: str) -> None:
        place = await door.admit(client, Cost(units=4 if client == "s" else 10))
        order.append(client)
        await settled()
        place.leave()

    await asyncio.gather(*map(ask_for, asked))
    assert (all_engines[0].gate.counted, door.waiting) == (0, 0)
    return order


async def test_turns_go_round_the_clients_and_small_requests_starve_no_large_one() -> None:
    assert await served("aaaabc") == list("aabcaa")
    assert (await served("ssbssssss")).index("b") <= 3


BIG = image_part(448, 5376)
SHORT, LONG = chat(BIG, stream=True, max_tokens=64), chat(BIG, stream=True, max_tokens=30_000)
TEXT, STATED = chat(stream=True, max_tokens=30_000), chat(stream=True, max_tokens=64)
#: More than its tokens by what a text and a template may take, which nobody counts.
FEW_TOKENS = 4 * 13 * 256


def queued_plan(**kv: int) -> Plan:
    """A plan that pays for one image of 13 tiles, whose engine may evict."""
    plan = plan_for(units_per_forward=13)
    plan = changed(plan, kv=replace(plan.engines[0].kv, **{"tokens": FEW_TOKENS, **kv}))
    plan = changed(plan, settings=replace(plan.engines[0].settings, max_batch_size=1024))
    assert plan.may_evict()
    return plan


async def begun(plan: Plan, *bodies: object, path=CHAT, answer=lambda: stream(EVENT, 0.3, EVENT)):
    """How many of these reach the engine before any of them has ended."""
    app, recorder = gateway(plan, recorder=Recorder(lambda *_: answer()))
    calls = [asyncio.ensure_future(call(app, path, body)) for body in bodies]
    await settled()
    early = len(recorder.seen)
    await asyncio.gather(*calls)
    assert len(recorder.seen) == len(bodies)
    (engine,) = app.engines
    assert engine.host_bytes == 0
    assert (engine.gate.counted, engine.gate.reserved) == (0, 0)
    return early


async def test_where_no_engine_may_evict_the_next_image_goes_on_at_the_first_token() -> None:
    plan = plan_for(units_per_forward=13)
    assert not plan.may_evict()
    whole = lambda: Answer(0.3, b"{}")  # noqa: E731
    assert await begun(plan, LONG, LONG) == 2
    assert await begun(plan, LONG, LONG, answer=lambda: stream(0.3, EVENT)) == 1
    # Text never waits behind images where the cache holds it.
    assert await begun(plan, chat(BIG), chat(BIG), chat(), chat(), answer=whole) == 3


@pytest.mark.parametrize(
    ("tokens", "bodies", "early"),
    [
        # Images run beside each other where the cache holds what they state,
        (FEW_TOKENS, [SHORT] * 5, 2),
        (3 * FEW_TOKENS, [SHORT] * 5, 5),
        # also where the length of an answer is not stated, which the gateway then states,
        (FEW_TOKENS, [chat(BIG, stream=True)] * 2, 2),
        # and where an answer may be long, wait for the end of the one before.
        (FEW_TOKENS, [LONG, LONG], 1),
        (FEW_TOKENS, [SHORT, LONG, SHORT], 1),
        # Text waits where it could evict several: one alone is paid for.
        (FEW_TOKENS, [SHORT, TEXT], 2),
        (FEW_TOKENS, [SHORT, SHORT, TEXT], 2),
        (FEW_TOKENS, [SHORT, SHORT, STATED], 3),
    ],
)
async def test_where_an_engine_may_evict_the_cache_decides_too(tokens, bodies, early) -> None:
    assert await begun(queued_plan(tokens=tokens), *bodies) == early


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
    big = chat(BIG, stream=streamed, max_tokens=30_000)
    first = asyncio.ensure_future(call(app, body=big, leave=gone))
    await settled()
    second = asyncio.ensure_future(call(app, body=big))
    loop.call_later(0.2, gone.set)
    await first
    await second
    assert (came[1] - came[0]) == pytest.approx(seconds + 0.2 * (not streamed), abs=0.1)


async def test_clients_that_wait_in_line_may_leave_and_a_long_wait_ends_with_429() -> None:
    plan, gone = plan_for(units_per_forward=13), asyncio.Event()
    slow = Recorder(lambda *_: Answer(0.4, b"{}"))
    app, recorder = gateway(plan, recorder=slow, queue_seconds=0.1)
    calls = [call(app, body=chat(BIG), leave=leave) for leave in (None, gone, None)]
    answers = asyncio.gather(*calls)
    await settled()
    assert app.admission.waiting == 2
    gone.set()
    good, _, busy = await answers
    assert (good.status, busy.status) == (200, 429)
    assert int(busy.headers["retry-after"]) >= 1
    assert busy.json["error"]["type"] == "rate_limit_error"
    assert (app.admission.waiting, len(recorder.seen)) == (0, 1)


async def test_a_request_is_not_refused_while_the_engine_works_on_and_in_all_waits_600_s() -> None:
    engine = RoutedEngine(0, "http://e0", gate=Gate(10))
    door = Admission(Fleet([engine]))
    first = await door.admit("a", Cost(units=10))
    waiting = [asyncio.ensure_future(door.admit("b", Cost(units=10))) for _ in range(2)]
    for _ in range(29):
        await asyncio.sleep(20)
        engine.note_byte()
    assert door.waits_for == "2 requests wait for the first tokens of the image requests before it"
    first.begin()
    await asyncio.sleep(19)
    assert [task.done() for task in waiting] == [True, False]
    await asyncio.sleep(2)
    refusal = waiting[1].exception()
    assert (refusal.key, refusal.status, refusal.retry_after) == ("busy:engines", 429, 8)
    assert "600 s" in refusal.message


async def test_a_request_is_refused_once_nothing_has_moved_for_30_s() -> None:
    engine = RoutedEngine(0, "http://e0", gate=Gate(10))
    door = Admission(Fleet([engine]))
    await door.admit("a", Cost(units=10))
    waiting = asyncio.ensure_future(door.admit("b", Cost(units=10)))
    await asyncio.sleep(29)
    assert not waiting.done()
    await asyncio.sleep(2)
    assert waiting.exception().key == "busy:engines"
    assert (door.waiting, door.waits_for) == (0, "")
