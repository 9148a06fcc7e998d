"""Requests that engines die of, through the whole gateway: suspected, then refused.

The bars are those of an hour of virtual time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from itertools import product

import pytest

from tests.support.gateway import DONE, EVENT, Answer, Recorder, call, chat, gateway, image_part
from tests.support.gateway import stream as streamed
from tests.support.waiting import auntil
from tests.sweep import part, sweep
from turbofit.gateway.routing.deny_list import DenyList

pytestmark = pytest.mark.slow

KILLS = "kills"


class Fleet:
    """Engines of which each dies at a killing request, and is started again after a while."""

    def __init__(
        self, engines: int, restart: float = 20.0, *, seconds: float = 0.5, **config
    ) -> None:
        self.deaths: list[str] = []
        self.seconds = seconds
        self.restart, self.waiting = restart, {index: set() for index in range(engines)}
        self.app, self.recorder = gateway(
            engines=engines, recorder=Recorder(self._answer), retry_seconds=0.5, **config
        )
        for engine in self.app.engines:
            engine.succeeded()

    async def _answer(self, engine, path, body):
        gone = asyncio.get_running_loop().create_future()
        self.waiting[engine.index].add(gone)
        try:
            if KILLS.encode() in body:
                await asyncio.sleep(0.05)
                if not gone.done():
                    self.kill(engine.index, body.decode())
            await asyncio.wait((gone,), timeout=self.seconds)
        finally:
            self.waiting[engine.index].discard(gone)
        if gone.done():
            return OSError("reset")
        return streamed(EVENT, 0.5, DONE) if b'"stream":true' in body else Answer(b"{}")

    def kill(self, index: int = 0, why: str = "") -> None:
        self.deaths.append(why)
        self.recorder.down.add(index)
        for gone in self.waiting[index]:
            if not gone.done():
                gone.set_result(None)
        asyncio.get_running_loop().call_later(self.restart, self.recorder.down.discard, index)

    async def ask(self, text: str, key: str = "", *, parts=(), leave=None, **facts):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        body = chat({"type": "text", "text": text}, *parts, **facts)
        return await call(self.app, body=body, headers=headers, leave=leave)

    def begin(self, text: str, key: str = "", **facts) -> asyncio.Task:
        return asyncio.ensure_future(self.ask(text, key, **facts))

    async def accused(self, *asked: tuple[str, str], **facts) -> list[tuple[int, str]]:
        """Texts with their clients' keys are there when their engine dies of something else."""
        pending = [self.begin(*words, **facts) for words in asked]
        await asyncio.sleep(0.1)
        self.kill()
        codes = [code(await reply) for reply in pending]
        await self.all_up()
        return codes

    async def leave(self, text: str) -> None:
        """A client sends this, and goes away once it is there."""
        gone, there = asyncio.Event(), self.app.engines[0]
        before, pending = there.outstanding, self.begin(text, leave=gone)
        await auntil(lambda: there.outstanding > before, "it to be sent")
        gone.set()
        await asyncio.gather(pending, return_exceptions=True)

    @property
    def known(self) -> tuple[int, int]:
        """How many requests are suspected; how many are refused."""
        return self.app.deny_list.numbers

    async def __aenter__(self):
        await self.app.startup()
        return self

    async def __aexit__(self, *_):
        await self.app.shutdown()

    async def all_up(self) -> None:
        await auntil(lambda: all(e.serves for e in self.app.engines), "all engines to serve")


DIED, CONVICTED = (503, "engine_died"), (422, "convicted")


def code(reply) -> tuple[int, str]:
    return reply.status, reply.json["error"]["code"]


@pytest.mark.parametrize("engines", [1, 8])
@pytest.mark.parametrize("parts", [(), (image_part(1200, 900),)])
async def test_the_third_death_of_a_request_is_its_last(engines, parts) -> None:
    async with Fleet(engines) as fleet:
        replies = []
        for _ in range(4):
            await fleet.all_up()
            replies.append(await fleet.ask(KILLS, parts=parts))
        await fleet.all_up()
        assert (await fleet.ask("another", parts=parts)).status == 200
        metrics = (await call(fleet.app, "/metrics")).body.decode()
        assert (len(fleet.deaths), fleet.known) == (3, (0, 1))
    assert [code(reply) for reply in replies] == [DIED, DIED, DIED, CONVICTED]
    message = replies[3].json["error"]["message"]
    assert "3 inference engines ended" in message
    assert "for 60 minutes" in message
    assert "retry-after" in replies[0].headers
    assert "retry-after" not in replies[3].headers
    assert "turbofit_gateway_convicted 1\n" in metrics
    assert 'turbofit_gateway_engine_deaths_total{engine="0"} ' in metrics


async def test_all_that_an_engine_had_are_suspected_until_they_are_answered() -> None:
    asked = [(f"innocent {n}", "") for n in range(6)]
    async with Fleet(1) as fleet:
        assert await fleet.accused(*asked) == [DIED] * 6
        assert fleet.known == (6, 0)
        again = await asyncio.gather(*(fleet.ask(*words) for words in asked))
        assert [reply.status for reply in again] == [200] * 6
        assert fleet.known == (0, 0)


async def test_what_an_engine_had_when_it_died_is_sent_to_no_other() -> None:
    async with Fleet(8) as fleet:
        crowd = [fleet.begin(f"innocent {number}") for number in range(24)]
        await asyncio.sleep(0.1)
        killing = await fleet.ask(KILLS)
        assert (code(killing), "retry-after" in killing.headers) == (DIED, True)
        beside = Counter([(await reply).status for reply in crowd])
        assert (beside, len(fleet.deaths), len(fleet.recorder.seen)) == ({200: 21, 503: 3}, 1, 25)
        assert (await fleet.ask("innocent after it")).status == 200
        left = {(e.outstanding, e.gate.counted, e.host_bytes) for e in fleet.app.engines}
        assert (left, fleet.app._bodies.in_memory) == ({(0, 0, 0)}, 0)
        # Who waits where nothing listens any more waits on.
        waiting = fleet.begin("innocent")
        await asyncio.sleep(0.1)
        (engine,) = (engine for engine in fleet.app.engines if engine.outstanding)
        fleet.app.monitor.doubt(engine)
        assert not engine.up
        assert (await waiting).status == 200


@pytest.mark.parametrize(("suspects", "together"), [(1, 1), (4, 2), (10, 4)])
async def test_few_suspects_run_at_a_time_beside_others(suspects: int, together: int) -> None:
    """As many as the square root of those of their end, also if all are of one client."""
    async with Fleet(1, api_key=("one", "other")) as fleet:
        (engine,) = fleet.app.engines
        await fleet.accused(*((f"{n}", "one") for n in range(suspects)))
        again = [fleet.begin(f"{n}", "one") for n in range(suspects)]
        others = [fleet.begin(f"x{n}", "other") for n in range(4)]
        most = 0
        while not all(task.done() for task in again):
            most = max(most, engine.outstanding - sum(not task.done() for task in others))
            await asyncio.sleep(0.02)
        assert most == together
        replies = await asyncio.gather(*again, *others)
        assert {reply.status for reply in replies} == {200}


@pytest.mark.parametrize(("killing", "rounds", "deaths"), [(False, 6, 1), (True, 12, 3)])
async def test_how_long_those_wait_that_one_end_met(
    killing: bool, rounds: int, deaths: int
) -> None:
    """36 whose answers take ten seconds: one after the other they waited for six minutes.

    The cause is one of them, or does not come again. Nobody is refused but the cause.
    """
    async with Fleet(1, restart=1.0, seconds=10.0) as fleet:
        began, answers = time.monotonic(), Counter[tuple[bool, int]]()

        async def ask(text: str) -> None:
            while (reply := await fleet.ask(text)).status == 503:
                await asyncio.sleep(float(reply.headers["retry-after"]))
            answers[text == KILLS, reply.status] += 1

        crowd = [asyncio.ensure_future(ask(f"innocent {number}")) for number in range(35)]
        await asyncio.sleep(0.1)
        if killing:
            crowd.append(asyncio.ensure_future(ask(KILLS)))
        else:
            crowd.append(asyncio.ensure_future(ask("innocent, too")))
            await asyncio.sleep(0.1)
            fleet.kill()
        await asyncio.gather(*crowd)
        # Beside the rounds: starts, and pauses of clients that were told to come again.
        assert time.monotonic() - began < rounds * 10 + (deaths + 1) * 10
    assert len(fleet.deaths) == deaths
    assert answers == ({(False, 200): 35, (True, 422): 1} if killing else {(False, 200): 36})


async def test_who_began_to_answer_is_not_suspected() -> None:
    """A stream that has begun is told of the death, and asks again beside all others."""
    async with Fleet(1) as fleet:
        fleet.recorder.answer = lambda *_: streamed(EVENT, 600.0)
        begun = fleet.begin("begun", stream=True)
        await asyncio.sleep(0.1)
        fleet.app.engines[0].abort_all()
        assert b'"engine_died"' in (await begun).body
        assert fleet.known == (0, 0)


async def test_a_copy_that_waits_for_its_turn_is_refused_as_the_turns_before_it_demand() -> None:
    async with Fleet(2) as fleet:
        await fleet.ask(KILLS)
        await fleet.all_up()
        copies = await asyncio.gather(*(fleet.ask(KILLS) for _ in range(3)))
        assert sorted(map(code, copies)) == [CONVICTED, DIED, DIED]
        assert (len(fleet.deaths), fleet.known) == (3, (0, 1))


async def test_only_ends_in_its_own_turns_refuse_a_request() -> None:
    """Copies of it were at four engines that ended of something else."""
    async with Fleet(4) as fleet:
        copies = [fleet.begin("innocent") for _ in range(4)]
        await auntil(lambda: all(fleet.waiting.values()), "one on each engine")
        for index in range(4):
            fleet.kill(index)
        assert [code(await reply) for reply in copies] == [DIED] * 4
        await fleet.all_up()
        assert fleet.known == (1, 0)
        assert ((await fleet.ask("innocent")).status, fleet.known) == (200, (0, 0))


async def test_who_left_shortly_before_a_death_is_suspected_and_refused_too() -> None:
    for seconds, suspected in ((0, [(1, 0), (1, 0), (0, 1)]), (11, [(0, 0)])):
        async with Fleet(1) as fleet:
            for known in suspected:
                await fleet.all_up()
                await fleet.leave(KILLS if seconds == 0 else "innocent")
                await asyncio.sleep(seconds)
                fleet.kill()
                fleet.app.engine_ended(0, other_cause=False)
                await asyncio.sleep(0.01)
                assert fleet.known == known


async def test_who_finds_nothing_listening_knows_that_the_engine_ended() -> None:
    """Its supervisor sees that a moment later; an equal request would end an engine until then."""
    async with Fleet(4) as fleet:
        await fleet.leave(KILLS)
        fleet.kill()
        met = [code(await fleet.ask(KILLS))]
        fleet.app.engine_ended(0, other_cause=False)
        met += [code(await fleet.ask(KILLS)), code(await fleet.ask(KILLS))]
        assert (met, len(fleet.deaths)) == ([DIED, DIED, CONVICTED], 3)


async def test_an_engine_that_somebody_killed_accuses_nobody() -> None:
    """Its supervisor takes the refusal back."""
    async with Fleet(1, restart=1.0) as fleet:
        for known in ((1, 0), (1, 0), (0, 1)):
            await fleet.all_up()
            pending = fleet.begin("innocent")
            await asyncio.sleep(0.1)
            fleet.kill()
            assert (code(await pending), fleet.known) == (DIED, known)
        fleet.app.engine_ended(0, other_cause=True)
        await fleet.all_up()
        assert ((await fleet.ask("innocent")).status, fleet.known) == (200, (0, 0))


@pytest.mark.parametrize("size", [10, 1 << 20])
async def test_a_fingerprint_is_keyed_and_of_all_that_the_engine_is_given(size: int) -> None:
    known, other = DenyList(), DenyList()
    given = [("/a", b"x" * size), ("/a", b"x" * size + b"y"), ("/b", b"x" * size)]
    names = [await known.fingerprint(*one) for one in given]
    assert len(set(names)) == 3
    assert names == [await known.fingerprint(*one) for one in given]
    assert names[0] != await other.fingerprint(*given[0])


#: Seconds that it goes on for: an hour in `--all`.
_LONG = part(3600, 9)


@pytest.mark.parametrize(
    ("kind", "asks", "engines"),
    sweep(product(("same", "new"), ("often", "seldom"), (8, 1)), 4),
)
async def test_a_client_that_kills_and_others_that_do_not(
    engines: int, kind: str, asks: str
) -> None:
    """It kills with one request, or with a new variation each time, in a tight loop.

    Others ask as the SDKs do, three times at most: 200 of them seldom, or three without a pause.
    None is ever refused. One that keeps asking is answered within five minutes, or fifteen where
    each of a thousand variations ends an engine.
    """
    answers: Counter[str] = Counter()
    keys = [f"good {number}" for number in range(200 if asks == "seldom" else 3)]

    async def good(fleet: Fleet, key: str, ends: float, rng: random.Random) -> None:
        number = 0
        while time.monotonic() < ends:
            await asyncio.sleep(rng.random() * (240 if asks == "seldom" else 4.0))
            number, stream = number + 1, rng.random() < 0.5
            for _ in range(3):
                reply = await fleet.ask(f"{key} {number}", key, stream=stream)
                if reply.status not in (429, 503):
                    break
                answers[reply.json["error"]["code"]] += 1
                await asyncio.sleep(float(reply.headers.get("retry-after", 1)))
            answers["good"] += reply.status == 200 and b'"error"' not in reply.body
            answers["sent"] += 1
            answers["refused"] += reply.status == 422

    async def keeps_asking(fleet: Fleet, ends: float) -> None:
        number = 0
        while time.monotonic() < ends:
            began, number = time.monotonic(), number + 1
            while (reply := await fleet.ask(f"patient {number}", "patient")).status != 200:
                assert reply.status in (429, 503)
                await asyncio.sleep(1.0)
            answers["longest"] = max(answers["longest"], round(time.monotonic() - began))

    async def bad(fleet: Fleet, ends: float) -> None:
        number = 0
        while time.monotonic() < ends:
            number += kind == "new"
            reply = await fleet.ask(f"{KILLS} {number}.", "bad")
            answers[f"bad {reply.status}"] += 1
            await asyncio.sleep(0.3)

    async with Fleet(engines, seconds=3.0, api_key=("bad", "patient", *keys)) as fleet:
        ends = time.monotonic() + _LONG
        for engine in fleet.app.engines:  # as whoever started them says
            engine.start_seconds = fleet.restart
        everybody = [good(fleet, key, ends, random.Random(key)) for key in keys]
        await asyncio.gather(*everybody, bad(fleet, ends), keeps_asking(fleet, ends))
        deaths = len(fleet.deaths)
    assert answers["refused"] == 0
    assert answers["sent"] > _LONG * (1 / 2 if kind == "same" else 1 / 30)
    if kind == "same":
        assert deaths <= 3
        assert answers["good"] >= 0.98 * answers["sent"]
        assert answers["bad 422"] > _LONG
    assert answers["longest"] <= (300 if kind == "same" else 900)
