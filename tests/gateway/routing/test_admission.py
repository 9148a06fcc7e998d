"""Who has a place at an engine, who waits for one; no forward has more units than the gate."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from random import Random

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
from tests.sweep import part
from tests.virtual_time import settled
from turbofit.core.plan import Plan
from turbofit.gateway.limits.gate import UNSTATED, Cost, Gate, KvCache, Share
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
SHORT, LONG = chat(BIG, stream=True, max_tokens=64), chat(BIG, stream=True)
TEXT, STATED = chat(stream=True), chat(stream=True, max_tokens=64)
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
        # and where an answer's length is not stated, wait for the end of the one before.
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
    big = chat(BIG, stream=streamed)
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


KV = KvCache(tokens=2000 + 640, longest=1024, block=64, ahead=2)


def gate(units: int = 13, kv: KvCache = KV) -> Gate:
    return Gate(units, kv)


def taken(door: Gate, units: int, tokens: int) -> Share:
    cost = Cost(units=units, tokens=tokens)
    assert door.fits(cost)
    return door.take(cost)


def test_a_reservation_is_whole_blocks_and_no_more_than_the_session() -> None:
    least = 3 * 64  # what a request of so few tokens reserves: its block, and two more
    for cost, reserved in (
        (Cost(tokens=64), least), (Cost(tokens=65), least + 64), (Cost(), 0),
        (Cost(tokens=UNSTATED), 1024 + 2 * 64), (Cost(tokens=64, copies=3), 3 * least),
    ):  # fmt: skip
        assert KV.reservation(cost) == reserved


def test_what_is_alone_or_holds_nothing_always_fits() -> None:
    door = gate(kv=KvCache())
    assert door.fits(Cost(units=13, tokens=UNSTATED, copies=100))
    assert not door.fits(Cost(units=14))
    taken(door, 13, UNSTATED)
    assert door.fits(Cost())


@dataclass(eq=False)
class Sequence:
    """A request at the engine: its true length grows up to what it reserved."""

    share: Share
    most: int
    length: int = 1
    encoded: bool = False
    evicted: bool = False


class Engine:
    """Evicts who has images when its blocks run out, and encodes what is evicted again."""

    def __init__(self, blocks: int, dice: Random) -> None:
        self.blocks, self._dice = blocks, dice
        self.there: list[Sequence] = []
        self.evictions = 0

    def any(self, *, evicted: bool = False) -> Sequence | None:
        sequences = [item for item in self.there if item.evicted is evicted]
        return self._dice.choice(sequences) if sequences else None

    def make_room(self) -> None:
        while sum(-(-item.length // 64) for item in self.there if not item.evicted) > self.blocks:
            running = [item for item in self.there if not item.evicted]
            victim = max(running, key=lambda item: (item.encoded, item.share.units, -item.length))
            victim.evicted, victim.encoded = True, False
            self.evictions += 1

    @property
    def forward(self) -> int:
        """Units of all that one forward may encode."""
        return sum(item.share.units for item in self.there if not item.encoded)


def history(dice: Random, *, steps: int = 300) -> tuple[int, int]:
    """Arrivals, first tokens, growth, evictions and ends in any order; how many came, and went.

    The question of the gateway is not simulated, and no room is left for it.
    """
    units, blocks = dice.randrange(13, 20), dice.randrange(4, 90)
    kv = KvCache(tokens=640 + 64 * blocks, longest=1024, block=64, ahead=2)
    engine, door = Engine(blocks, dice), Gate(units, kv)
    came = 0
    for _ in range(steps):
        what = dice.choice(("come", "come", "token", "token", "grow", "grow", "back", "end"))
        sequence = engine.any(evicted=what == "back")
        if what == "come":
            stated = dice.choice((64, 64, 200, 500, UNSTATED))
            cost = Cost(units=dice.choice((0, 5, 9, 13, 13)), tokens=stated)
            if door.fits(cost):
                # Two tokens beyond its end, and a block that it copies.
                most = min(stated, kv.longest) + 2 + 64
                engine.there.append(Sequence(door.take(cost), most))
                came += 1
        elif sequence is None:
            pass
        elif what == "token":
            sequence.encoded = True
            door.begin(sequence.share)
        elif what == "grow":
            sequence.length = sequence.most
        elif what == "back":
            sequence.evicted = False
        else:
            engine.there.remove(sequence)
            door.end(sequence.share)
        engine.make_room()
        assert engine.forward <= units
    for sequence in engine.there:
        door.end(sequence.share)
    assert (door.counted, door.reserved) == (0, 0)
    return came, engine.evictions


def test_no_forward_has_more_units_than_the_gate() -> None:
    histories = [history(Random(seed)) for seed in range(part(300, 5))]
    came, evictions = zip(*histories, strict=True)
    assert sum(came) > 25 * len(histories)
    assert sum(evictions) > 5 * len(histories)


def test_a_line_before_the_gate_comes_to_its_end() -> None:
    """Nobody starves: whoever is first in line fits once those before it have ended."""
    door, waiting = gate(), [Cost(units=13 - n, tokens=UNSTATED) for n in range(9)]
    there: list[Share] = []
    while waiting or there:
        while waiting and door.fits(waiting[0]):
            there.append(door.take(waiting.pop(0)))
        assert there
        door.end(there.pop(0))
    assert door.reserved == 0
