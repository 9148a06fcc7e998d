"""Clients that leave before the engine ends of their request, through the whole gateway."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from tests import virtual_time
from tests.gateway.routing.test_quarantine import Fleet, code, wall
from tests.support.gateway import Answer, call, chat
from tests.virtual_time import settled
from tests.waiting import auntil
from turbofit.gateway.quarantine.identity import RequestIdentity
from turbofit.gateway.quarantine.quarantined import Accused, EngineDeath

__all__ = ["wall"]

SLOW = "ends its engine after three seconds, whoever waits"


class SlowDeaths(Fleet):
    """A request that ends its engine only after a while, though its client left; others take 5 s.

    As one does whose images the engine prepares beside its loop.
    """

    async def _answer(self, engine, path, body):
        if SLOW.encode() in body:
            loop = asyncio.get_running_loop()
            loop.call_later(3.0, self.kill, engine.index, "slow")
        gone = asyncio.get_running_loop().create_future()
        self.held[engine.index].add(gone)
        try:
            await asyncio.wait((gone,), timeout=5.0)
        finally:
            self.held[engine.index].discard(gone)
        return OSError("reset") if gone.done() else Answer(b"{}")

    async def __aenter__(self):
        probe = self.recorder.probe

        async def slowly(engine):
            await asyncio.sleep(0.05)
            return await probe(engine)

        self.app.monitor._probe = slowly
        return await super().__aenter__()

    async def leaves(self, text: str, seconds: float) -> None:
        """A client sends this, and goes away after a while."""
        gone = asyncio.Event()
        body = chat({"type": "text", "text": text})
        pending = asyncio.ensure_future(call(self.app, body=body, leave=gone))
        await auntil(lambda: not all(one.idle for one in self.app.engines), "it to be sent")
        await asyncio.sleep(seconds)
        gone.set()
        await asyncio.gather(pending, return_exceptions=True)

    async def made_suspect(self, text: str) -> None:
        """It was at a death that somebody else's request caused."""
        pending = asyncio.ensure_future(self.ask(text))
        await asyncio.sleep(1.0)
        self.kill(next(one.index for one in self.app.engines if one.outstanding), "before")
        await pending
        await self.all_up()


@pytest.mark.parametrize("engines", [1, 3])
def test_a_suspect_is_not_convicted_of_what_a_client_that_left_caused(engines) -> None:
    async def run():
        async with SlowDeaths(engines, restart=2.0) as fleet:
            await fleet.made_suspect("innocent")
            for engine in fleet.app.engines:
                engine.draining = engine.index != 0
            await fleet.leaves(SLOW, 0.1)
            for engine in fleet.app.engines:
                engine.draining = False
            reply = await fleet.ask("innocent")
            await asyncio.sleep(10.0)
            return reply.status, fleet.app.quarantine.suspects.number[1], fleet.deaths

    status, convicted, deaths = virtual_time.run(run())
    assert (status, convicted) == (200, 0)
    assert deaths == ["before", "slow"]


def test_a_request_is_not_alone_where_a_client_has_just_left() -> None:
    """It is sent again, as whoever was beside another one is."""

    async def run():
        async with SlowDeaths(3) as fleet:
            await fleet.leaves(SLOW, 0.1)
            for engine in fleet.app.engines:
                engine.draining = engine.index != 0
            pending = asyncio.ensure_future(fleet.ask("innocent"))
            await settled()
            for engine in fleet.app.engines:
                engine.draining = False
            reply = await pending
            await fleet.all_up()
            return reply.status, fleet.app.quarantine.suspects.number, len(fleet.deaths)

    assert virtual_time.run(run()) == (200, (1, 0), 1)


def test_who_leaves_again_and_again_is_convicted_at_the_second_end_though_others_came() -> None:
    """The engine answers the gateway's question, takes others, and ends of who left it."""

    async def run():
        async with SlowDeaths(1, restart=2.0) as fleet:
            suspects, numbers = fleet.app.quarantine.suspects, []
            for number in range(2):
                await fleet.all_up()
                await fleet.leaves(SLOW, 0.1)
                await asyncio.sleep(1.0)
                await fleet.ask(f"innocent {number}")
                numbers.append(suspects.number[1])
            return numbers, code(await fleet.ask(SLOW)), len(fleet.deaths)

    assert virtual_time.run(run()) == ([0, 1], (422, "convicted"), 2)


def test_others_go_on_as_soon_as_the_engine_of_a_suspect_that_left_answers() -> None:
    async def run():
        async with SlowDeaths(1) as fleet:
            await fleet.made_suspect("innocent")
            await fleet.leaves("innocent", 1.0)
            since = time.monotonic()
            reply = await fleet.ask("another")
            return reply.status, time.monotonic() - since

    status, seconds = virtual_time.run(run())
    assert status == 200
    assert seconds < 6.0


@pytest.mark.parametrize(
    ("texts", "convicted"),
    [(["suspect"], 1), (["suspect", "suspect"], 1), (["another", "suspect"], 0)],
)
def test_the_last_that_left_was_alone_unless_another_one_had_left_just_before(
    texts, convicted
) -> None:
    async def run():
        async with SlowDeaths(1) as fleet:
            (engine,), quarantine = fleet.app.engines, fleet.app.quarantine

            def known(text: str) -> RequestIdentity:
                return RequestIdentity(quarantine._fingerprints, "/", text.encode(), ())

            suspect = known("suspect")
            accused = Accused(fingerprint=await suspect.fingerprint(), sketch=suspect.sketch)
            quarantine.suspects.accuse(EngineDeath(9), accused)
            engine.outstanding = len(texts)
            for text in texts:
                engine.outstanding -= 1
                quarantine.left(SimpleNamespace(engine=engine, outcome=None, identity=known(text)))
            fleet.app.engine_ended(0, other_cause=False)
            await quarantine.close()
            return quarantine.suspects.number[1]

    assert virtual_time.run(run()) == convicted
