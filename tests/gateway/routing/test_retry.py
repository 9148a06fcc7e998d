"""Requests that have not begun to be answered, and the engines that they lose."""

from __future__ import annotations

import asyncio

import pytest

from bench.common.gateway import (
    DONE,
    EVENT,
    Answer,
    Recorder,
    ask,
    call,
    chat,
    gateway,
    image_part,
    stream,
)
from tests import virtual_time
from tests.virtual_time import settled
from tests.waiting import HANG, auntil
from turbofit.gateway.http.app import Gateway

POISON = "poison"


def broken(*_):
    return OSError("reset")


def vanish(*_):
    return OSError(110, "ETIMEDOUT")


class Mortals:
    """Engines that hold every request until `release`, and die of a poisonous one.

    As a process does: all that it had breaks off, and nothing listens any more.
    """

    def __init__(self, engines: int, **config) -> None:
        self.app, self.recorder = gateway(
            engines=engines, recorder=Recorder(self._answer), queue_seconds=HANG, **config
        )
        for engine in self.app.engines:
            engine.succeeded()
        self.held: dict[int, list[asyncio.Future[None]]] = {}
        self.asked: dict[int, list[str]] = {}
        self._released = False
        #: Poisonous requests are held like others.
        self.patient = False
        self._changed = asyncio.Event()

    @property
    def dead(self) -> set[int]:
        return self.recorder.down

    async def _answer(self, engine, path, body):
        text = str(body)
        self.asked.setdefault(engine.index, []).append(text)
        held: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.held.setdefault(engine.index, []).append(held)
        self._changed.set()
        if POISON in text and not self.patient:
            self.kill(engine.index)
        elif self._released:
            held.set_result(None)
        try:
            await held
        except OSError as exc:
            return exc
        return stream(EVENT, DONE)

    def kill(self, index: int) -> None:
        self.dead.add(index)
        self._changed.set()
        for held in self.held.pop(index, []):
            if not held.done():
                held.set_exception(OSError("reset"))

    def release(self) -> None:
        """All that wait are answered, and those to come at once."""
        self._released = True
        for index in tuple(self.held):
            for held in self.held.pop(index):
                if not held.done():
                    held.set_result(None)

    async def died(self, engines: int = 1) -> None:
        """So many engines have died."""
        while len(self.dead) < engines:
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), HANG)

    async def until(self, there: int) -> None:
        """So many requests are in flight."""
        while sum(map(len, self.held.values())) < there:
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), HANG)

    def send(self, text: str, key: str = "") -> asyncio.Task:
        body = chat({"type": "text", "text": text}, stream=True)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return asyncio.ensure_future(call(self.app, body=body, headers=headers))

    async def crowd(self, count: int, there: int = 0, key: str = "") -> list[asyncio.Task]:
        """So many innocent requests, all in flight."""
        tasks = []
        for number in range(count):
            tasks.append(self.send(f"innocent {number}", key))
            await self.until(there + number + 1)
        return tasks

    def times(self, text: str) -> list[int]:
        """The engines that had a request, in order of their numbers."""
        return [
            index for index in sorted(self.asked) for one in self.asked[index] if f'"{text}"' in one
        ]

    async def settled(self, *tasks: asyncio.Task) -> list:
        return await asyncio.wait_for(asyncio.gather(*tasks), HANG)


def metric(app: Gateway, name: str, label: str = "") -> int:
    for line in ask(app, "/metrics").body.decode().splitlines():
        if line.startswith(f"turbofit_gateway_{name}{label} "):
            return int(line.rpartition(" ")[2])
    return 0


@pytest.mark.parametrize("engines", [1, 2, 3, 9])
def test_what_an_engine_died_of_alone_is_sent_to_no_other(engines) -> None:
    async def run():
        mortal = Mortals(engines)
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
def test_one_request_ends_two_engines_at_most_and_never_the_last(engines, each) -> None:
    async def run():
        mortal = Mortals(engines)
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
    assert poisonous.status == (422 if engines > 2 else 503)
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
        len(mortal.asked[index]) == 1 + sum("innocent" in one for one in mortal.asked[index])
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
        mortal = Mortals(engines, api_keys=("good", "bad"))
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
    assert {reply.status for reply in replies} <= {422, 503}
    assert 2 <= len(mortal.dead) < engines
    assert all(len(mortal.times(f"{POISON} {number}")) <= 2 for number in range(3))
    assert [reply.status for reply in others] == [200] * 7
    assert others[-1].status == 200


def test_innocent_ones_beside_a_death_are_answered_elsewhere() -> None:
    """Killed by somebody, or by a request of another gateway: all go on."""

    async def run():
        mortal = Mortals(3)
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
        mortal = Mortals(3)
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
        mortal = Mortals(3)
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


def test_a_second_death_alone_convicts_and_one_among_others_does_not() -> None:
    async def run(seconds: float):
        mortal = Mortals(4)
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
        return mortal, reply, await mortal.settled(second, beside)

    mortal, reply, others = virtual_time.run(run(1.0))
    assert (reply.status, reply.json["error"]["code"]) == (422, "convicted")
    assert "2 inference engines ended" in reply.json["error"]["message"]
    assert len(mortal.times("first")) == 2
    assert [one.status for one in others] == [200, 200]
    # For half a minute it had the engine for itself; then others came.
    mortal, reply, others = virtual_time.run(run(31.0))
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


def test_who_was_answered_in_part_by_another_is_not_what_an_engine_died_of() -> None:
    answers = [Answer(b'{"half', vanish()), broken(), Answer(b"{}")]
    app, recorder = gateway(engines=5, recorder=Recorder(lambda *_: answers.pop(0)))
    for engine in app.engines:
        engine.succeeded()
    assert ask(app, body=chat()).status == 200
    assert [seen[0] for seen in recorder.seen] == [0, 1, 2]


def test_what_was_begun_is_not() -> None:
    recorder = Recorder(lambda *_: stream(EVENT, OSError("reset")))
    app, _ = gateway(engines=2, recorder=recorder)
    reply = ask(app, body=chat(stream=True))
    assert reply.status == 200
    assert b'"engine_died"' in reply.body
    assert len(recorder.seen) == 1


def test_three_engines_at_most_have_one_request() -> None:
    recorder = Recorder(vanish)
    app, _ = gateway(engines=9, recorder=recorder)
    reply = ask(app, body=chat())
    assert (reply.status, reply.json["error"]["code"]) == (503, "engine_died")
    assert [seen[0] for seen in recorder.seen] == [0, 1, 2]


def test_engines_that_are_not_reached_do_not_count() -> None:
    recorder = Recorder(lambda engine, *_: vanish() if engine.index == 0 else stream(EVENT))
    recorder.down = {1, 2, 3, 4}
    app, _ = gateway(engines=6, recorder=recorder)
    assert ask(app, body=chat()).body == EVENT
    assert [engine.up for engine in app.engines] == [False] * 5 + [True]


@pytest.mark.parametrize("vanished", [False, True])
def test_who_waits_where_nothing_listens_any_more(vanished) -> None:
    """A refused connection tells that the process ended, a silent one that its machine did."""

    async def run():
        mortal = Mortals(2)
        waiting = mortal.send("innocent")
        await mortal.until(1)
        mortal.app.monitor.gone(mortal.app.engines[0], vanished=vanished)
        mortal.release()
        return (await mortal.settled(waiting))[0].status

    assert asyncio.run(run()) == (200 if vanished else 503)


def test_what_a_draining_engine_does_not_end_in_time_is_sent_again() -> None:
    async def run():
        mortal = Mortals(2)
        waiting = mortal.send("innocent")
        await mortal.until(1)
        mortal.app.engines[0].draining = True
        mortal.kill(0)
        mortal.release()
        return (await mortal.settled(waiting))[0].status

    assert asyncio.run(run()) == 200


def test_an_engine_s_own_error_is_its_answer() -> None:
    recorder = Recorder(lambda *_: Answer(b'{"message":"no"}', status=500))
    app, _ = gateway(engines=2, recorder=recorder)
    assert ask(app, body=chat()).status == 500
    assert len(recorder.seen) == 1


def test_the_same_engine_is_never_asked_again() -> None:
    recorder = Recorder(vanish)
    app, _ = gateway(engines=2, recorder=recorder)
    assert ask(app, body=chat()).json["error"]["code"] == "engine_died"
    assert [seen[0] for seen in recorder.seen] == [0, 1]


def test_a_body_is_kept_until_the_answer_begins_and_no_longer() -> None:
    async def run(full: bool):
        app, _ = gateway(engines=2, recorder=Recorder(lambda *_: stream(0.05, EVENT, 0.05, DONE)))
        other = app._bodies._room // 2 if full else 0
        app._bodies.keep(other)
        asked = asyncio.ensure_future(call(app, body=chat(image_part(), stream=True)))
        await settled()
        early = app._bodies.in_memory - other
        await asyncio.sleep(0.05)
        await settled()
        late = app._bodies.in_memory - other
        await asked
        return early > 0, late, app._bodies.in_memory - other

    assert virtual_time.run(run(False)) == (True, 0, 0)
    assert virtual_time.run(run(True)) == (False, 0, 0)


def test_without_room_for_its_body_a_request_is_not_sent_again() -> None:
    async def run():
        def answer(*_):
            return stream(0.01, vanish())

        app, recorder = gateway(engines=2, recorder=Recorder(answer))
        app._bodies.keep(app._bodies._room // 2)
        reply = await call(app, body=chat(image_part(), stream=True))
        return reply, len(recorder.seen)

    reply, asked = virtual_time.run(run())
    assert (reply.status, asked) == (503, 1)


def test_a_retry_goes_before_those_who_wait_and_holds_nobody_up() -> None:
    async def run():
        order = []

        async def answer(engine, path, body):
            order.append((engine.index, body.count(b"first") > 0))
            if len(order) == 1:
                await asyncio.sleep(0.05)
                return vanish()
            return Answer(0.1, b"{}")

        app, _ = gateway(engines=2, recorder=Recorder(answer))
        for engine in app.engines:
            engine.gate = 13
        app.fleet.set(app.engines)

        def body(text):
            return chat(image_part(1792, 1344), {"type": "text", "text": text})

        calls = [asyncio.ensure_future(call(app, body=body("first")))]
        for number in range(3):
            await settled()
            calls.append(asyncio.ensure_future(call(app, body=body(f"x{number}"))))
        replies = await asyncio.wait_for(asyncio.gather(*calls), 5)
        return order, [reply.status for reply in replies]

    order, statuses = virtual_time.run(run())
    assert statuses == [200] * 4
    # Engine 0 vanished with the first, and gets nothing new; engine 1 had the first next of all.
    assert order == [(0, True), (1, False), (1, True), (1, False), (1, False)]


def test_an_engine_that_breaks_off_gets_nothing_new_until_it_answers() -> None:
    """It has nothing to do, so that it would be chosen first, again and again."""

    async def run():
        working = False

        def answer(engine, path, body):
            return broken() if engine.index == 0 and not working else stream(EVENT, DONE)

        app, recorder = gateway(engines=2, recorder=Recorder(answer), retry_seconds=0.0)
        await app.startup()
        try:
            replies = [await call(app, body=chat(stream=True, seed=n)) for n in range(20)]
            asked = [seen[0] for seen in recorder.seen]
            working = True
            await auntil(lambda: app.engines[0].up, "the engine to be asked again")
            return [reply.status for reply in replies], asked, app.engines[0].up
        finally:
            await app.shutdown()

    statuses, asked, up = virtual_time.run(run())
    assert statuses == [503] + [200] * 19
    assert asked.count(0) == 1
    assert up


def test_a_client_that_left_is_not_sent_on() -> None:
    async def run():
        gone = asyncio.Event()
        app, recorder = gateway(engines=2, recorder=Recorder(lambda *_: stream(5.0, EVENT)))
        asked = asyncio.ensure_future(call(app, body=chat(stream=True), leave=gone))
        await settled()
        gone.set()
        app.engines[0].abort_all()
        await asyncio.wait_for(asyncio.gather(asked, return_exceptions=True), 2)
        return len(recorder.seen), [e.outstanding for e in app.engines], app._bodies.in_memory

    assert virtual_time.run(run()) == (1, [0, 0], 0)
