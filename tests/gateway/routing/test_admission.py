"""Who has a place at an engine, who waits for one; no forward has more units than the gate."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests import virtual_time
from tests.support.gateway import (
    CHAT,
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
from tests.sweep import part
from tests.virtual_time import settled
from turbofit.core.plan import Plan
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.gate import UNSTATED, Cost, Gate, KvCache
from turbofit.gateway.routing.admission import Admission
from turbofit.gateway.routing.engines import Fleet, RoutedEngine, Turn


class Queue:
    """The door of an engine that is full."""

    def __init__(self, longest: int) -> None:
        self.engine = RoutedEngine(0, "http://e0", host_limit=1)
        self.door = Admission(Fleet([self.engine]), longest=longest)
        self.engine.host_bytes = 1  # of another one

    async def ask(self, client: str) -> asyncio.Task:
        task = asyncio.ensure_future(self.door.admit(client, Cost(host_bytes=1)))
        await settled()
        return task


def refused(task: asyncio.Task) -> bool:
    if not task.done():
        return False
    assert isinstance(error := task.exception(), Refusal)
    assert (error.status, error.reason) == (429, "busy")
    return True


async def test_one_client_may_fill_the_queue_and_makes_room_for_the_others() -> None:
    """Its newest requests go, and only until each client has as many places as the others."""
    queue = Queue(8)
    many = [await queue.ask("many") for _ in range(9)]
    alone = [refused(task) for task in many]
    few = [await queue.ask("few") for _ in range(5)]
    third = await queue.ask("third")
    mine = [refused(task) for task in (*many, *few)]
    last, waiting = refused(third), queue.door.waiting
    for task in (*many, *few, third):
        task.cancel()
    await settled()
    assert alone == [False] * 8 + [True]
    # Four places each; the third client's comes from one of the two.
    assert mine == [*[False] * 3, *[True] * 6, *[False] * 4, True]
    assert (last, waiting, queue.door.waiting, queue.door._queue.lines) == (False, 8, 0, {})


async def test_whoever_gets_in_gives_its_place_in_the_queue_back() -> None:
    queue = Queue(2)
    tasks = [await queue.ask("many"), await queue.ask("many")]
    queue.engine.host_bytes = 0
    queue.door.pump()
    await settled()
    assert tasks[0].result().engine is queue.engine
    assert (refused(await queue.ask("many")), queue.door.waiting) == (False, 2)


async def test_a_suspect_that_must_wait_holds_nobody_up_and_has_one_turn_on_all_engines() -> None:
    engines = [RoutedEngine(n, f"http://e{n}", host_limit=1) for n in range(3)]
    door = Admission(Fleet(engines))
    turns = [Turn(name, alone=False, longer=False) for name in ("a", "a", "b")]
    tasks = [asyncio.ensure_future(door.admit("one", Cost(), None, turn)) for turn in turns]
    await settled()
    there = [task.done() for task in tasks]
    other = (await door.admit("other", Cost(host_bytes=1))).engine
    tasks[0].result().end_turn()
    await settled()
    assert (there, other.index, tasks[1].done(), door.waiting) == ([True, False, True], 0, True, 0)


async def test_an_engine_gets_nothing_new_while_a_suspect_is_alone_there() -> None:
    engine = RoutedEngine(0, "http://e")
    door, turn = Admission(Fleet([engine])), Turn("a", alone=True, longer=False)
    place = await door.admit("one", Cost(), None, turn)
    other = asyncio.ensure_future(door.admit("other", Cost()))
    await settled()
    waits = not other.done()
    place.end_turn()
    assert (waits, (await other).engine) == (True, engine)


def engines(count: int = 1, gate=10, host_limit=10**9) -> list[RoutedEngine]:
    return [
        RoutedEngine(index, f"http://e{index}", gate=Gate(gate), host_limit=host_limit)
        for index in range(count)
    ]


async def test_turns_go_round_the_clients() -> None:
    all_engines = engines()
    door, order = Admission(Fleet(all_engines)), []

    async def ask_for(client: str, number: int):
        place = await door.admit(client, Cost(units=10))
        order.append(f"{client}{number}")
        await asyncio.sleep(0)
        place.leave()

    greedy = [asyncio.ensure_future(ask_for("a", i)) for i in range(4)]
    await asyncio.sleep(0)
    await asyncio.gather(ask_for("b", 0), ask_for("c", 0), *greedy)
    assert order == ["a0", "a1", "a2", "b0", "c0", "a3"]
    assert (all_engines[0].units, door.waiting) == (0, 0)


async def test_a_large_request_is_not_starved_by_small_ones() -> None:
    all_engines = engines()
    door, order = Admission(Fleet(all_engines)), []

    async def ask_for(client, units):
        place = await door.admit(client, Cost(units=units))
        order.append((client, units))
        await asyncio.sleep(0.001)
        place.leave()

    await asyncio.gather(
        ask_for("s", 4), ask_for("s", 4), ask_for("big", 10), *(ask_for("s", 4) for _ in range(6))
    )
    assert order.index(("big", 10)) <= 3


async def test_the_line_has_an_end_and_a_deadline() -> None:
    door = Admission(Fleet(engines()), longest=1, seconds=0.05)
    first = await door.admit("a", Cost(units=10))
    late = asyncio.ensure_future(door.admit("b", Cost(units=1)))
    await asyncio.sleep(0)
    for _ in range(2):
        with pytest.raises(Refusal) as full:
            await door.admit("c", Cost(units=1))
        assert full.value.status == 429
    with pytest.raises(Refusal) as waited:
        await late
    assert (waited.value.status, door.waiting) == (429, 0)
    first.leave()
    assert (await door.admit("d", Cost(units=10))).engine.units == 10


@pytest.mark.parametrize("cost", [Cost(units=11), Cost(host_bytes=51)])
async def test_what_no_engine_could_hold_is_refused_at_once(cost) -> None:
    with pytest.raises(Refusal) as caught:
        await Admission(Fleet(engines(host_limit=50))).admit("a", cost)
    assert caught.value.status == 400


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10), st.integers(0, 3), st.booleans()), max_size=40),
    st.integers(1, 3),
)
def test_no_engine_ever_holds_more_than_its_gate(requests, count) -> None:
    async def run():
        all_engines = engines(count)
        door, most = Admission(Fleet(all_engines), seconds=5.0), 0

        async def ask_for(units, client, leaves):
            nonlocal most
            cost = Cost(units=units, host_bytes=units)
            place = await door.admit(str(client), cost)
            place.engine.outstanding += 1
            most = max(most, *(e.units for e in all_engines))
            try:
                await asyncio.sleep(0.0005 * units)
            finally:
                place.engine.outstanding -= 1
                place.leave()

        tasks = [asyncio.ensure_future(ask_for(*request)) for request in requests]
        await asyncio.sleep(0.001)
        for task, (_, _, leaves) in zip(tasks, requests, strict=True):
            if leaves:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return most, [(e.units, e.host_bytes, e.outstanding) for e in all_engines], door.waiting

    most, left, waiting = virtual_time.run(run())
    assert most <= 10
    assert left == [(0, 0, 0)] * count
    assert waiting == 0


async def test_a_text_passes_images_that_wait_but_no_text_that_does() -> None:
    """The tokens that texts reserve hold up an image at the head of the line, and not for good."""
    kv = KvCache(tokens=640 + 20 * 64, longest=16 * 64, block=64)
    engine = RoutedEngine(0, "http://e", gate=Gate(13, kv))
    door, order, places = Admission(Fleet([engine])), [], {}

    def ask(name: str, units: int, tokens: int) -> asyncio.Task[None]:
        async def ask_for() -> None:
            places[name] = await door.admit(name, Cost(units=units, tokens=tokens))
            order.append(name)

        return asyncio.ensure_future(ask_for())

    async def then(*names: str) -> None:
        for name in names:
            places[name].leave()
        await virtual_time.settled()

    tasks = [ask("image", 13, 64), ask("image that waits", 13, 64), ask("text", 0, 64)]
    await virtual_time.settled()
    assert order == ["image", "text"]
    places["image"].begin()
    await virtual_time.settled()
    assert order[2:] == ["image that waits"]
    places["image that waits"].begin()
    tasks += [ask("long text", 0, UNSTATED), ask("short text", 0, 64)]
    await virtual_time.settled()
    assert order[3:] == []  # the long one could evict, and the short one stays behind it
    await then("image")
    assert order[3:] == ["long text", "short text"]
    await then("image that waits", "text", "long text", "short text")
    assert (engine.units, engine.gate.reserved) == (0, 0)
    await asyncio.gather(*tasks)
    assert len(order) == 5


async def test_those_who_wait_are_told_when_the_last_engine_dies() -> None:
    all_engines = engines()
    door = Admission(Fleet(all_engines))
    await door.admit("a", Cost(units=10))
    waiting = asyncio.ensure_future(door.admit("b", Cost(units=5)))
    await asyncio.sleep(0)
    all_engines[0].up = False
    door.pump()
    with pytest.raises(Refusal) as caught:
        await waiting
    assert caught.value.status == 503


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


async def begun(
    plan: Plan, *bodies: object, path: str = CHAT, answer=lambda: stream(EVENT, 0.3, EVENT)
) -> int:
    """How many of these reach the engine before any of them has ended."""
    app, recorder = gateway(plan, recorder=Recorder(lambda *_: answer()))
    calls = [asyncio.ensure_future(call(app, path, body)) for body in bodies]
    await settled()
    early = len(recorder.seen)
    await asyncio.gather(*calls)
    assert len(recorder.seen) == len(bodies)
    (engine,) = app.engines
    assert (engine.units, engine.host_bytes) == (0, 0)
    assert (engine.gate.counted, engine.gate.reserved) == (0, 0)
    return early


async def test_where_no_engine_may_evict_the_next_image_goes_on_at_the_first_token() -> None:
    plan = plan_for(units_per_forward=13)
    assert not plan.may_evict()
    assert await begun(plan, *[chat(BIG, stream=True)] * 2) == 2
    assert await begun(plan, *[chat(BIG, stream=True)] * 2, answer=lambda: stream(0.3, EVENT)) == 1
    assert await begun(plan, *[chat(BIG)] * 2, answer=lambda: Answer(0.3, b"{}")) == 1


async def test_images_run_beside_each_other_where_the_cache_holds_what_they_state() -> None:
    short = chat(BIG, stream=True, max_tokens=64)
    assert await begun(queued_plan(), short, short) == 2
    assert await begun(queued_plan(), *[short] * 5) == 2
    assert await begun(queued_plan(tokens=3 * FEW_TOKENS), *[short] * 5) == 5


async def test_an_image_whose_answer_is_not_stated_waits_for_the_end_of_the_one_before() -> None:
    short, long = chat(BIG, stream=True, max_tokens=64), chat(BIG, stream=True)
    assert await begun(queued_plan(), long, long) == 1
    assert await begun(queued_plan(), short, long, short) == 1


async def test_text_waits_where_it_could_evict_images_that_run_beside_each_other() -> None:
    short, text = chat(BIG, stream=True, max_tokens=64), chat(stream=True)
    assert await begun(queued_plan(), short, text) == 2  # one image: it is paid for
    assert await begun(queued_plan(), short, short, text) == 2
    stated = chat(stream=True, max_tokens=64)
    assert await begun(queued_plan(), short, short, stated) == 3


async def test_text_never_waits_behind_images_where_the_cache_holds_it() -> None:
    bodies = [chat(BIG), chat(BIG), chat(), chat()]
    answer = lambda: Answer(0.2, b"{}")  # noqa: E731
    assert await begun(plan_for(units_per_forward=13), *bodies, answer=answer) == 3


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


async def test_the_name_of_the_answer_s_length_is_the_route_s() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": BASE64}
    image = {"type": "image", "source": source}
    body = {"messages": [{"role": "user", "content": [image]}], "model": "m", "stream": True}
    for tokens, early in ((64, 2), (20_000, 1)):
        bodies = [{**body, "max_tokens": tokens}] * 2
        assert await begun(queued_plan(), *bodies, path="/v1/messages") == early


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


async def test_a_long_wait_ends_with_429() -> None:
    plan = plan_for(units_per_forward=13)
    slow = Recorder(lambda *_: Answer(0.4, b"{}"))
    app, _ = gateway(plan, recorder=slow, queue_seconds=0.1)
    big = chat(image_part(448, 5376))
    (good, busy) = await asyncio.gather(*(call(app, body=big) for _ in range(2)))
    assert (good.status, busy.status) == (200, 429)
    assert int(busy.headers["retry-after"]) >= 1
    assert busy.json["error"]["type"] == "rate_limit_error"


KV = KvCache(tokens=2000 + 640, longest=1024, block=64)
#: What a request of so few tokens reserves: its block, and two more.
LEAST = 3 * 64


def gate(units: int = 13, kv: KvCache = KV) -> Gate:
    return Gate(units, kv)


def taken(door: Gate, units: int, tokens: int = 64) -> Cost:
    cost = Cost(units=units, tokens=tokens)
    assert door.fits(cost)
    door.take(cost)
    return cost


def test_a_reservation_is_whole_blocks_and_no_more_than_the_session() -> None:
    assert KV.reservation(Cost(tokens=64)) == LEAST
    assert KV.reservation(Cost(tokens=65)) == LEAST + 64
    assert KV.reservation(Cost(tokens=UNSTATED)) == 1024 + 2 * 64
    assert KV.reservation(Cost(tokens=64, copies=3)) == 3 * LEAST
    assert KV.reservation(Cost()) == 0


def test_the_next_goes_on_at_the_first_token_where_nothing_can_be_evicted() -> None:
    door = gate()
    first = taken(door, 13)
    assert not door.fits(Cost(units=13, tokens=64))
    assert door.begin(first)
    second = taken(door, 13)
    assert (door.counted, door.reserved) == (13, 2 * LEAST)
    door.end(first)
    door.end(second)
    assert (door.counted, door.reserved) == (0, 0)


def test_where_something_can_be_evicted_units_count_to_the_end() -> None:
    door = gate()
    first = taken(door, 7)
    door.begin(first)
    long = taken(door, 0, UNSTATED)
    longer = taken(door, 6, UNSTATED)
    door.begin(longer)
    assert door.counted == 13  # the first's as well: it may be encoded again
    assert not door.fits(Cost(units=1, tokens=64))
    door.end(long)
    assert door.reserved < KV.room
    # It may have been evicted meanwhile, and not have come back yet.
    assert not door.fits(Cost(units=1, tokens=64))
    door.end(first)
    assert door.fits(Cost(units=7, tokens=64))
    assert not door.fits(Cost(units=8, tokens=64))


def test_a_text_that_could_evict_waits_where_more_images_run_than_a_forward_may_have() -> None:
    door = gate()
    for _ in range(2):
        door.begin(taken(door, 13))
    assert not door.fits(Cost(tokens=UNSTATED, copies=2))
    assert door.fits(Cost(tokens=64))


def test_what_holds_nothing_always_fits() -> None:
    door = gate(kv=KvCache())
    taken(door, 13, UNSTATED)
    assert door.fits(Cost())
    assert not door.begin(Cost())


def test_a_request_alone_fits_whatever_it_reserves() -> None:
    assert gate(kv=KvCache()).fits(Cost(units=13, tokens=UNSTATED, copies=100))
    assert not gate().fits(Cost(units=14))


@dataclass(eq=False)
class Sequence:
    """A request at the engine: its true length grows up to what it reserved."""

    cost: Cost
    door: Gate
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
            victim = max(running, key=lambda item: (item.encoded, item.cost.units, -item.length))
            victim.evicted, victim.encoded = True, False
            self.evictions += 1

    @property
    def forward(self) -> int:
        """Units of all that one forward may encode."""
        return sum(item.cost.units for item in self.there if not item.encoded)


def history(dice: Random, *, steps: int = 300) -> tuple[int, int]:
    """Arrivals, first tokens, growth, evictions and ends in any order; how many came, and went.

    The question of the gateway is not simulated, and no room is left for it.
    """
    units, blocks = dice.randrange(13, 20), dice.randrange(4, 90)
    kv = KvCache(tokens=640 + 64 * blocks, longest=1024, block=64)
    engine, door = Engine(blocks, dice), Gate(units, kv)
    came = 0
    for _ in range(steps):
        what = dice.choice(("come", "come", "token", "token", "grow", "grow", "back", "end"))
        sequence = engine.any(evicted=what == "back")
        if what == "come":
            stated = dice.choice((64, 64, 200, 500, UNSTATED))
            cost = Cost(units=dice.choice((0, 5, 9, 13, 13)), tokens=stated)
            if door.fits(cost):
                door.take(cost)
                # Two tokens beyond its end, and a block that it copies.
                most = min(stated, kv.longest) + 2 + 64
                engine.there.append(Sequence(cost, door, most))
                came += 1
        elif sequence is None:
            pass
        elif what == "token":
            sequence.encoded = True
            sequence.door.begin(sequence.cost)
        elif what == "grow":
            sequence.length = sequence.most
        elif what == "back":
            sequence.evicted = False
        else:
            engine.there.remove(sequence)
            sequence.door.end(sequence.cost)
        engine.make_room()
        assert engine.forward <= units
    for sequence in engine.there:
        sequence.door.end(sequence.cost)
    assert (door.counted, door.reserved) == (0, 0)
    return came, engine.evictions


@settings(max_examples=part(300, 3))
@given(st.integers(0, 1 << 32))
def test_no_forward_has_more_units_than_the_gate(seed: int) -> None:
    history(Random(seed))


def test_the_histories_hold_evictions() -> None:
    came, evictions = zip(*(history(Random(seed)) for seed in range(20)), strict=True)
    assert sum(came) > 500
    assert sum(evictions) > 100


def test_a_line_before_the_gate_comes_to_its_end() -> None:
    """Nobody starves: whoever is first in line fits once those before it have ended."""
    door, waiting = gate(), [Cost(units=13 - n, tokens=UNSTATED) for n in range(9)]
    there: list[Cost] = []
    while waiting or there:
        while waiting and door.fits(waiting[0]):
            door.take(waiting[0])
            there.append(waiting.pop(0))
        assert there
        door.end(there.pop(0))
    assert door.reserved == 0
