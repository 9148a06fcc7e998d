"""An engine keeps its conversations, as long as it is not much busier than the others."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from msgspec.structs import replace

from tests.support.gateway import (
    DONE,
    EVENT,
    Recorder,
    anthropic,
    call,
    chat,
    gateway,
    image_part,
    picture,
    plan_for,
    stream,
)
from tests.virtual_time import settled
from turbofit.gateway.limits.gate import Cost, Gate
from turbofit.gateway.routing.admission import Admission, Place
from turbofit.gateway.routing.conversations import Conversation, conversation_of
from turbofit.gateway.routing.engines import Fleet, RoutedEngine, Turn

QUESTION = {"role": "user", "content": "And then?"}
ANSWER = {"role": "assistant", "content": "Two cats."}
CALL = {"type": "function_call", "name": "look", "arguments": "{}"}


def read(body: Any, kind: Any = "chat", key: str = "") -> Conversation | None:
    return asyncio.run(conversation_of(kind, json.dumps(body).encode(), key))


def later(body: dict[str, Any], *more: Any, field: str = "messages") -> dict[str, Any]:
    return {**body, field: [*body[field], ANSWER, QUESTION, *more]}


@pytest.mark.parametrize(
    ("kind", "first", "field"),
    [
        ("chat", chat(image_part()), "messages"),
        ("chat", {"messages": [{"role": "system", "content": "s"}, QUESTION]}, "messages"),
        ("messages", anthropic(picture(64, 64)), "messages"),
        ("responses", {"input": [QUESTION]}, "input"),
    ],
)
def test_the_turns_of_a_conversation_have_one_beginning(kind, first, field) -> None:
    begun, next_one = read(first, kind), read(later(first, field=field), kind)
    assert begun is not None
    assert next_one is not None
    assert (begun.goes_on, next_one.goes_on) == (False, True)
    assert begun.beginning == next_one.beginning
    assert read({**first, "model": "an adapter"}, kind).beginning != begun.beginning
    assert read(first, kind, key="alice").beginning != begun.beginning
    other = {**first, field: [{"role": "user", "content": "else"}, *first[field]]}
    assert read(other, kind).beginning != begun.beginning


def test_a_picture_is_part_of_the_beginning_and_a_mark_for_caches_is_not() -> None:
    assert read(chat(image_part(64))).beginning != read(chat(image_part(65))).beginning
    text = {"type": "text", "text": "x" * 70_000}  # read in a thread
    marked = {**text, "cache_control": {"type": "ephemeral"}}
    first, moved = ({"messages": [{"role": "user", "content": [one]}]} for one in (marked, text))
    moved = later(moved, {"role": "user", "content": [marked]})
    assert read(first, "messages").beginning == read(moved, "messages").beginning


def test_a_call_is_an_answer_and_prompts_begin_with_their_first_characters() -> None:
    assert read({"input": [QUESTION, CALL]}, "responses").goes_on
    assert read({"input": "hello"}, "responses") is None
    long = "a" * 1024
    for kind in ("completions", "generate"):
        one, other = read({"prompt": long}, kind), read({"prompt": [f"{long} more"]}, kind)
        assert one == other
        assert one.goes_on
        assert read({"prompt": "short"}, kind) is None
    for body in (
        {},
        {"messages": "text"},
        {"messages": [{"role": "system"}]},
        [],
        {"messages": [1]},
    ):
        assert read(body) is None
    assert asyncio.run(conversation_of("chat", b"{", "")) is None
    assert read(later(anthropic(picture(64, 64))), "count_tokens") is None, "nothing is read"


def engines(count: int = 3) -> list[RoutedEngine]:
    return [RoutedEngine(number, "http://x", gate=Gate(5)) for number in range(count)]


def going(name: bytes, *, on: bool = True) -> Conversation:
    return Conversation(beginning=name, goes_on=on)


def test_a_later_turn_goes_to_the_engine_of_the_turn_before() -> None:
    three = engines()
    fleet = Fleet(three)
    fleet.note(going(b"a"), three[2])
    fleet.running.clear()  # the turn before has ended
    assert fleet.best(Cost(), None, going(b"a")) is three[2]
    assert fleet.best(Cost(), None, going(b"a", on=False)) is three[0], "a first turn"
    assert fleet.best(Cost(), None, going(b"b")) is three[0], "nobody knows it"
    share = three[2].gate.take(Cost(units=5))
    assert fleet.best(Cost(units=1), None, going(b"a")) is None, "first tokens are soon there"
    assert fleet.best(Cost(units=1), Turn("x", together=1, alone=False), going(b"a")) is three[0]
    three[2].gate.reserved = 1
    assert fleet.best(Cost(units=1), None, going(b"a")) is three[0], "answers have to end first"
    three[2].gate.reserved = 0
    three[2].gate.end(share)
    turn = Turn("x", together=1, alone=True)
    three[2].turns["its place"] = turn
    assert fleet.best(Cost(), None, going(b"a")) is three[0], "a suspect is alone there"
    three[2].turns.clear()
    assert fleet.best(Cost(), turn, going(b"a")) is three[2], "a suspect's turn is there as well"
    three[2].up = False
    assert fleet.best(Cost(), None, going(b"a")) is three[0]


def test_an_engine_that_is_much_busier_makes_way() -> None:
    """Of 1,000 equal beginnings nearly all engines get as many as without conversations."""
    four = engines(4)
    fleet, same = Fleet(four), going(b"a")
    for _ in range(1000):
        best = fleet.best(Cost(), None, same)
        fleet.note(same, best)
        best.outstanding += 1
    most = max(engine.outstanding for engine in four)
    assert most <= 1.25 * 250 + 2
    assert sum(engine.conversations for engine in four) == 1


def test_a_new_conversation_goes_to_the_engine_that_keeps_the_fewest_of_equals() -> None:
    two = engines(2)
    fleet = Fleet(two)
    places = []
    for number in range(4):
        conversation = going(str(number).encode(), on=False)
        best = fleet.best(Cost(), None, conversation)
        fleet.note(conversation, best)
        places.append(best.index)
    assert places == [0, 1, 0, 1]


def test_the_table_forgets_the_conversation_that_was_silent_for_longest() -> None:
    (engine,) = engines(1)
    table = Fleet([engine])
    for number in range(4096):
        table.note(going(str(number).encode()), engine)
    table.note(going(b"0"), engine)
    table.note(going(b"new"), engine)
    assert table.keeper(Cost(), going(b"0")) is engine
    assert table.keeper(Cost(), going(b"1")) is None
    assert engine.conversations == 4096


@pytest.mark.parametrize("prefix_caching", [True, False])
async def test_turns_stay_at_their_engine_and_go_on_elsewhere_when_it_ends(
    prefix_caching: bool,
) -> None:
    plan = plan_for()
    (engine,) = plan.engines
    settings = replace(engine.settings, enable_prefix_caching=prefix_caching)
    plan = replace(plan, engines=(replace(engine, settings=settings),))
    app, recorder = gateway(plan, engines=2, recorder=Recorder(lambda *_: stream(EVENT, DONE)))
    body = chat(image_part(), stream=True)
    app.engines[0].outstanding = 1
    await call(app, body=body)
    app.engines[0].outstanding = 0
    for turn in range(6):
        body = later(body)
        if turn == 3:
            recorder.down.add(1)
        assert (await call(app, body=body)).status == 200
    came = [index for index, *_ in recorder.seen]
    assert came == ([1, 1, 1, 1, 0, 0, 0] if prefix_caching else [1, 0, 0, 0, 0, 0, 0])
    counted = {
        line.partition("{")[2]
        for line in (await app.metrics_text()).splitlines()
        if line.startswith("turbofit_gateway_follow_ups_total{")
    }
    kept = {
        'engine="0",kept="false"} 1', 'engine="0",kept="true"} 2', 'engine="1",kept="true"} 4',
    }  # fmt: skip
    assert counted == (kept if prefix_caching else set())


async def test_a_turn_waits_for_its_engine_and_holds_up_nobody_who_goes_to_another() -> None:
    """Elsewhere its pictures would be read again, before those who wait there."""
    two = engines(2)
    fleet, picture = Fleet(two), Cost(units=5)
    door = Admission(fleet)

    async def ask(conversation: Conversation | None = None) -> asyncio.Task[Place]:
        task = asyncio.ensure_future(door.admit("c", picture, None, conversation))
        await settled()
        return task

    first = (await ask()).result()
    assert first.engine is two[0]
    fleet.note(going(b"a"), two[0])
    fleet.running.clear()
    later, other, third, again = [
        await ask(each) for each in (going(b"a"), None, None, going(b"a"))
    ]
    assert [task.done() for task in (later, other, third, again)] == [False, True, False, False]
    assert "first tokens" in door.waits_for
    other.result().begin()
    await settled()
    assert [task.done() for task in (later, third, again)] == [False, True, False]
    assert {other.result().engine, third.result().engine} == {two[1]}
    first.begin()
    await settled()
    assert (later.result().engine, later.result().kept, again.done()) == (two[0], True, False)
    two[0].up = False
    third.result().begin()
    await settled()
    assert again.result().engine is two[1]
    for task in (later, third, again):
        task.result().leave()
    first.leave()
    other.result().leave()
    assert not fleet.running


async def test_requests_that_all_begin_alike_wait_for_no_engine() -> None:
    four = engines(4)
    door = Admission(Fleet(four))
    tasks = [
        asyncio.ensure_future(door.admit("c", Cost(units=5), None, going(b"a"))) for _ in range(4)
    ]
    await settled()
    assert {task.result().engine for task in tasks} == set(four)
