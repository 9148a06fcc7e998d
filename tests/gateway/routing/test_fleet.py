"""Which engine is next, by shares and units, and what clients are told where none is."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest
from msgspec.structs import replace

import turbofit
from tests.gateway.routing.dying_engines import serving
from tests.support.gateway import (
    Recorder,
    ask,
    call,
    chat,
    gateway,
    image_part,
    plan_for,
)
from tests.support.waiting import auntil
from turbofit.core.plan import GroupPlan, Plan
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.limits.gate import Cost, Gate
from turbofit.gateway.limits.request_limits import bounds_of
from turbofit.gateway.routing.engines import Affinity, Fleet, Outage, RoutedEngine, Turn
from turbofit.gateway.server import make_gateway


def test_the_engine_that_one_more_request_fills_least_is_next() -> None:
    three = [RoutedEngine(i, "http://x", share, gate=Gate(5)) for i, share in enumerate((1, 1, 2))]
    fleet = Fleet(three)
    assert fleet.best(Cost()) is three[2], "the largest share"
    three[2].outstanding = 1
    assert fleet.best(Cost()) is three[0], "of equals the first"
    three[0].gate.counted = 5
    assert fleet.best(Cost()) is three[1], "the fewest units"
    three[0].up = three[2].up = False
    assert fleet.best(Cost(units=6)) is None, "it has no room"
    turn = Turn("a", alone=False, longer=False)
    three[1].turn_of = turn
    assert (fleet.best(Cost(), turn), fleet.best(Cost()), fleet.open) == (None, three[1], 1)
    turn.alone = True
    assert fleet.best(Cost()) is None


def test_a_gateway_without_a_network_gives_up_soon() -> None:
    recorder = Recorder()
    recorder.down = set(range(100))
    app, _ = gateway(engines=100, recorder=recorder)
    reply = ask(app, body=chat())
    assert (reply.status, reply.json["error"]["code"]) == (503, "engine_unavailable")
    assert sum(not engine.up for engine in app.engines) == 16


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
    clock[0] += 300
    fast.succeeded()
    fast.note_death()
    assert fleet.dead().retry_after == fleet.retry_seconds == 33, "the slow one is later than ever"
    fast.rested = True
    clock[0] += 600
    fast.succeeded()
    assert fast.start_seconds == 30.5, "it was left alone"


class Clock:
    """Moved by the test alone."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def outage(clock: Clock) -> Outage:
    return Outage("the inference engine ended 6 times within 10 minutes and rests", 1600.0, clock)


def test_clients_learn_why_and_for_how_long() -> None:
    clock = Clock()
    app, recorder = gateway(engines=2)
    for engine in app.engines:
        engine.succeeded()
    app.rest(outage(clock))
    for now, left in ((1000.0, "600"), (1168.5, "432"), (1599.9, "1"), (1700.0, "1")):
        clock.now = now
        reply, health = ask(app, body=chat(image_part())), ask(app, "/health")
        assert (reply.status, reply.json["error"]["code"]) == (503, "engine_resting")
        assert (health.status, health.json["status"], health.json["up"]) == (503, "resting", 0)
        for answer, text in (
            (reply, reply.json["error"]["message"]),
            (health, health.json["message"]),
        ):
            assert answer.headers["retry-after"] == left
            assert text == (
                "the inference engine ended 6 times within 10 minutes and rests; "
                f"the next start is in {left} s"
            )
    assert recorder.seen == []


async def test_after_the_rest_the_first_answer_brings_it_back() -> None:
    app, recorder = gateway(recorder=Recorder(), retry_seconds=0.0)
    app.engines[0].succeeded()
    app.rest(outage(Clock()))
    recorder.works = False
    async with serving(app):
        app.rest(None)
        starting = await call(app, "/health")
        recorder.works = True
        app.monitor.suspect(app.engines[0])
        await auntil(lambda: app.engines[0].up, "the engine to be back")
        health, reply = await call(app, "/health"), await call(app, body=chat())
    assert (starting.status, starting.headers["retry-after"]) == (503, "5")
    assert starting.json["status"] == "unavailable"
    assert (health.status, reply.status) == (200, 200)


async def test_who_waits_is_told_when_a_rest_begins() -> None:
    app, recorder = gateway()
    app.engines[0].gate = Gate(13)
    app.fleet.__init__(app.engines)
    ended = asyncio.get_running_loop().create_future()

    async def answer(*_):
        return await ended

    recorder.answer = answer
    body = chat(image_part(1792, 1344))
    calls = [asyncio.ensure_future(call(app, body=body)) for _ in range(2)]
    while not (recorder.seen and app.admission.waiting):
        await asyncio.sleep(0)
    app.rest(outage(Clock()))
    ended.set_result(OSError("reset"))
    replies = await asyncio.wait_for(asyncio.gather(*calls), 120)
    assert [reply.status for reply in replies] == [503, 503]
    assert "600" in [reply.headers["retry-after"] for reply in replies]


URLS = ["http://127.0.0.1:1", "http://127.0.0.1:2"]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return turbofit.plan("internvl2-8b-awq", on="rtx3090+rtx4080")


@pytest.mark.parametrize(
    ("shares", "wanted"), [((3.25, 4.75), (3, 5)), ((2.0, 6.0), (2, 6)), ((1.0, 1.0), (4, 4))]
)
def test_eight_requests_go_as_the_plan_counts_them(shares, wanted) -> None:
    all_engines = [RoutedEngine(i, URLS[i], share) for i, share in enumerate(shares)]
    for _ in range(8):
        Fleet(all_engines).best(Cost()).outstanding += 1
    assert tuple(engine.outstanding for engine in all_engines) == wanted


def test_alone_a_request_goes_to_the_engine_of_the_larger_share(plan: Plan) -> None:
    gateway = make_gateway(plan, URLS, GatewayConfig())
    shares = [engine.share for engine in gateway.engines]
    assert shares == [group_plan.at_once for group_plan in plan.by_group]
    assert gateway.fleet.best(Cost()).share == max(shares)


def test_engines_that_were_not_planned_take_the_same(plan: Plan) -> None:
    three = make_gateway(plan, [*URLS, "http://127.0.0.1:3"], GatewayConfig())
    assert Counter(engine.share for engine in three.engines) == {1.0: 3}
    equal = make_gateway(plan_for(), URLS, GatewayConfig())
    assert {engine.share for engine in equal.engines} == {1.0}


def test_what_is_paid_for_on_each_card_needs_no_gate(plan: Plan) -> None:
    assert len({group_plan.units_per_forward for group_plan in plan.by_group}) == 1
    assert bounds_of(plan).gate is None


def test_the_gate_is_that_of_the_card_that_paid_least(plan: Plan) -> None:
    first, second = plan.by_group
    poorer = (
        first,
        GroupPlan(settings=second.settings, kv=second.kv, units_per_forward=20, at_once=3),
    )
    assert bounds_of(replace(plan, by_group=poorer)).gate == 20


def test_requests_are_held_to_what_the_smallest_cache_promises(plan: Plan) -> None:
    least = min(group_plan.kv.longest_request_tokens for group_plan in plan.by_group)
    assert bounds_of(plan).longest_request_tokens == least
    assert bounds_of(plan).limits.n == min(
        group_plan.settings.max_batch_size for group_plan in plan.by_group
    )


def conversation(*texts: str, **fields):
    return {"messages": [{"role": "user", "content": text} for text in texts], **fields}


def test_long_beginnings_stay_together_until_that_costs_too_much() -> None:
    all_engines, memory = [RoutedEngine(n, "http://x") for n in range(3)], Affinity()
    long = "x" * 3000
    all_engines[0].outstanding, fleet = 1, Fleet(all_engines)

    def chosen(*texts: str) -> RoutedEngine:
        best = fleet.best(Cost())
        assert best is not None
        return memory.chooser(conversation(*texts))(best, lambda engine: True)

    home = chosen(long)
    assert home.index == 1
    home.outstanding = 3
    again = chosen(long, "and then?")
    assert again.index == 1
    home.outstanding = 9
    assert chosen(long, "and then?").index == 2
    assert chosen("hi").index == 2
