"""Requests that engines die of, and the innocent ones beside them."""

from __future__ import annotations

import asyncio

import pytest

from tests import virtual_time
from tests.gateway.routing.dying_engines import POISON, DyingEngines, metric, vanish
from tests.support.gateway import (
    DONE,
    EVENT,
    Answer,
    Recorder,
    ask,
    chat,
    gateway,
    image_part,
    stream,
)
from tests.virtual_time import settled


@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize("engines", [1, 2, 3, 9])
def test_what_an_engine_died_of_alone_is_sent_to_no_other(engines, loops) -> None:
    async def run():
        mortal = DyingEngines(engines, loops=loops)
        (reply,) = await mortal.settled(mortal.send(POISON))
        mortal.release()
        after = await mortal.settled(mortal.send("innocent")) if engines > 1 else []
        return mortal, reply, after

    mortal, reply, after = asyncio.run(run())
    assert (reply.status, reply.json["error"]["code"]) == (503, "engine_died")
    assert reply.headers["retry-after"] == "5"
    assert mortal.dead == {0}
    assert all(one.status == 200 for one in after)
    assert metric(mortal.app, "retried_total") == 0
    if engines > 1:
        assert "only request" in reply.json["error"]["message"]
        assert metric(mortal.app, "not_retried_total", '{why="alone"}') == 1


@pytest.mark.parametrize("engines", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("loops", [False, True])
def test_one_request_ends_two_engines_at_most_and_never_the_last(engines, each, loops) -> None:
    async def run():
        mortal = DyingEngines(engines, loops=loops)
        crowd = await mortal.crowd(engines * each)
        poisonous = mortal.send(POISON)
        await mortal.died()
        mortal.release()
        return (
            mortal,
            (await mortal.settled(poisonous))[0],
            await mortal.settled(*crowd),
            await mortal.settled(mortal.send("innocent after it")),
        )

    mortal, poisonous, crowd, after = virtual_time.run(run())
    assert poisonous.status == 503
    assert len(mortal.dead) == min(2, engines - 1)
    assert len(mortal.times(POISON)) == len(mortal.dead)
    assert after[0].status == 200
    assert {reply.status for reply in crowd} <= {200, 503}
    # Who was never beside the poison has an answer; and so has who was beside it once, where more
    # than one engine is left.
    for number, reply in enumerate(crowd):
        beside = len(set(mortal.times(f"innocent {number}")) & set(mortal.times(POISON)))
        left = engines - len(mortal.dead)
        if beside == 0 or (beside == 1 and left > 1):
            assert reply.status == 200, (number, beside)
        assert reply.status == 200 or reply.headers["retry-after"] == "5"
    # Nobody was beside it when it ended the second engine.
    assert all(
        len(mortal.received[index]) == 1 + sum("innocent" in one for one in mortal.received[index])
        for index in mortal.dead
    )
    assert [(e.outstanding, e.units, e.host_bytes) for e in mortal.app.engines] == [
        (0, 0, 0)
    ] * engines
    assert mortal.app._bodies.in_memory == 0


@pytest.mark.parametrize("engines", [3, 4, 6])
def test_many_poisonous_requests_do_not_end_the_last_engine_by_being_sent_again(engines) -> None:
    """Several at the same engine, and innocent ones beside them."""

    async def run():
        mortal = DyingEngines(engines, api_keys=("good", "bad"))
        mortal.app.engines[0].share = 1000.0  # the least busy one, whatever it has
        crowd = await mortal.crowd(6, key="good")
        mortal.patient = True
        held = [mortal.send(f"{POISON} {number}", "bad") for number in range(3)]
        await mortal.until(9)
        assert list(mortal.held) == [0]
        mortal.patient = False
        mortal.kill(0)
        mortal.release()
        replies = await mortal.settled(*held)
        return (
            mortal,
            replies,
            await mortal.settled(*crowd, mortal.send("innocent after it", "good")),
        )

    mortal, replies, others = virtual_time.run(run())
    assert {reply.status for reply in replies} == {503}
    assert 2 <= len(mortal.dead) < engines
    assert all(len(mortal.times(f"{POISON} {number}")) <= 2 for number in range(3))
    assert [reply.status for reply in others] == [200] * 7
    assert others[-1].status == 200


def test_innocent_ones_beside_a_death_are_answered_elsewhere() -> None:
    """Killed by somebody, or by a request of another gateway: all go on."""

    async def run():
        mortal = DyingEngines(3)
        crowd = await mortal.crowd(6)
        mortal.kill(0)
        mortal.release()
        return mortal, await mortal.settled(*crowd)

    mortal, crowd = asyncio.run(run())
    assert [reply.status for reply in crowd] == [200] * 6
    assert metric(mortal.app, "retried_total") == 2


def test_the_last_engine_that_serves_gets_nothing_of_a_death() -> None:
    """An engine that never answered does not count as serving."""

    async def run():
        mortal = DyingEngines(3)
        mortal.app.engines[2].last_success = float("-inf")
        crowd = await mortal.crowd(6)
        mortal.kill(0)
        mortal.release()
        return mortal, await mortal.settled(*crowd)

    mortal, crowd = asyncio.run(run())
    assert sorted(reply.status for reply in crowd) == [200] * 4 + [503] * 2
    assert metric(mortal.app, "not_retried_total", '{why="last_engine"}') == 2


def test_who_waits_for_a_second_engine_is_told_when_it_becomes_the_last() -> None:
    async def run():
        mortal = DyingEngines(3)
        crowd = await mortal.crowd(6)
        mortal.kill(0)
        while not mortal.app._trials.waiting:
            await asyncio.sleep(0)
        mortal.app.engines[1].up = False
        mortal.app._pump()
        told = await mortal.settled(*(crowd[number] for number in (0, 3)))
        mortal.release()
        return told, await mortal.settled(*crowd)

    told, everybody = virtual_time.run(run())
    assert [(reply.status, reply.headers["retry-after"]) for reply in told] == [(503, "5")] * 2
    assert sorted(reply.status for reply in everybody) == [200] * 4 + [503] * 2


@pytest.mark.parametrize("loops", [False, True])
def test_a_second_death_alone_convicts_and_one_among_others_does_not(loops) -> None:
    async def run(seconds: float):
        mortal = DyingEngines(4, loops=loops)
        mortal.app.engines[0].share = mortal.app.engines[1].share = 1000.0
        first = mortal.send("first")
        await mortal.until(1)
        mortal.app.engines[1].share = 1.0
        second = mortal.send("second")
        await mortal.until(2)
        assert list(mortal.held) == [0]
        mortal.kill(0)
        await mortal.until(1)
        await asyncio.sleep(seconds)
        _, home = mortal.times("first")
        mortal.app.engines[home].share = 1000.0
        beside = mortal.send("beside")
        while not mortal.times("beside"):
            await settled()
        mortal.kill(home)
        (reply,) = await mortal.settled(first)
        mortal.release()
        others = await mortal.settled(second, beside)
        return mortal, reply, others, (await mortal.settled(mortal.send("first")))[0]

    mortal, reply, others, later = virtual_time.run(run(1.0))
    assert (reply.status, reply.json["error"]["code"]) == (503, "engine_died")
    assert (later.status, later.json["error"]["code"]) == (422, "convicted")
    assert "2 inference engines ended" in later.json["error"]["message"]
    assert len(mortal.times("first")) == 2
    assert [one.status for one in others] == [200, 200]
    # For half a minute it had the engine for itself; then others came.
    mortal, reply, others, later = virtual_time.run(run(31.0))
    assert later.status == 200
    assert (reply.status, reply.json["error"]["code"]) == (503, "engine_died")
    assert "two inference engines" in reply.json["error"]["message"]
    assert metric(mortal.app, "not_retried_total", '{why="second_death"}') == 1


@pytest.mark.parametrize(
    "first",
    [
        vanish, lambda: stream(vanish()), lambda: stream(EVENT[:9], vanish()),
        lambda: Answer(b'{"half', vanish()),
    ],
)  # fmt: skip
@pytest.mark.parametrize("body", [chat(image_part(), stream=True), chat(image_part(), n=2)])
def test_who_loses_a_machine_is_sent_again_to_the_last_engine_too(first, body) -> None:
    recorder = Recorder(lambda engine, *_: first() if engine.index == 0 else stream(EVENT, DONE))
    app, _ = gateway(engines=2, recorder=recorder)
    reply = ask(app, body=body)
    assert (reply.status, reply.body) == (200, EVENT + DONE)
    assert [seen[0] for seen in recorder.seen] == [0, 1]
    assert recorder.bodies[0] == recorder.bodies[1]
    text = ask(app, "/metrics").body.decode()
    assert "turbofit_gateway_retried_total 1\n" in text
    assert 'turbofit_gateway_engine_failures_total{engine="0"} 1\n' in text
    left = [(e.units, e.host_bytes, e.outstanding) for e in app.engines]
    assert left == [(0, 0, 0)] * 2
    assert app._bodies.in_memory == 0
