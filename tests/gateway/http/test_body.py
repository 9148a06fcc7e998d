"""Bodies that come slowly, stand still or never end, and what they leave to others."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from typing import Any

import pytest

from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http.body import LARGE, Bodies
from turbofit.gateway.http.refusals import Refusal

JSON = {b"content-type": b"application/json"}


class Upload:
    """A client's body: `send` returns once it was taken."""

    def __init__(self, bodies: Bodies, client: str) -> None:
        self._parts: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._wants = asyncio.Semaphore(0)
        self.task = asyncio.ensure_future(bodies.read(JSON, self._receive, client))

    async def _receive(self):
        self._wants.release()
        return await self._parts.get()

    async def wanted(self) -> None:
        """Until the gateway waits for more, or has done with it."""
        asks = asyncio.ensure_future(self._wants.acquire())
        await asyncio.wait((asks, self.task), return_when=asyncio.FIRST_COMPLETED)
        asks.cancel()

    async def send(self, size: int, *, more: bool = True) -> None:
        self._parts.put_nowait({"type": "http.request", "body": b" " * size, "more_body": more})
        await self.wanted()

    async def refusal(self) -> Refusal:
        with pytest.raises(Refusal) as caught:
            await self.task
        return caught.value


def make(room: int = 100, **config) -> Bodies:
    bodies = Bodies(50, GatewayConfig(**{"body_window_seconds": 10.0, "body_rate": 1, **config}))
    bodies._room = room
    return bodies


async def begun(bodies, client: str, *sizes: int) -> Upload:
    upload = Upload(bodies, client)
    await upload.wanted()
    for size in sizes:
        await upload.send(size)
    return upload


async def test_a_slow_but_honest_client_is_served() -> None:
    bodies, began = make(), time.monotonic()
    upload = await begun(bodies, "a", 10)
    for _ in range(3):
        await asyncio.sleep(10)
        await upload.send(10)
    await upload.send(1, more=False)
    assert await upload.task == b" " * 41
    assert time.monotonic() - began == pytest.approx(30.0, abs=0.1)
    assert (bodies.in_memory, bodies._held_bytes) == (0, {})


@pytest.mark.parametrize(("sizes", "after"), [((), 10), ((50,), 20), ((10, 9), 20)])
async def test_a_body_below_the_least_rate_is_given_up(sizes, after) -> None:
    bodies, began = make(), time.monotonic()
    upload = await begun(bodies, "a", *sizes[:1])
    await asyncio.sleep(9.5)
    for size in sizes[1:]:
        await upload.send(size)
    await asyncio.wait((upload.task,), timeout=100)
    refusal = await upload.refusal()
    assert (refusal.status, refusal.reason, bodies.in_memory) == (408, "slow_body", 0)
    assert time.monotonic() - began <= after + 0.5


async def test_a_body_that_is_here_is_not_late_while_it_waits_for_a_thread(monkeypatch) -> None:
    async def busy(act):
        await asyncio.sleep(100)
        return act()

    monkeypatch.setattr("turbofit.gateway.http.body.in_thread", busy)
    bodies = make(10 * LARGE)
    bodies._most = LARGE
    upload = await begun(bodies, "a")
    await upload.send(LARGE, more=False)
    assert len(await upload.task) == LARGE


async def test_a_body_has_a_deadline_however_it_comes() -> None:
    upload = await begun(make(body_seconds=25.0, body_rate=0), "a", 10)
    await asyncio.sleep(24)
    await upload.send(10)
    await asyncio.sleep(1)
    assert (await upload.refusal()).key == "slow_body"


async def test_a_client_alone_gets_half_and_others_are_served_meanwhile() -> None:
    bodies = make()
    first = await begun(bodies, "a", 30)
    second = await begun(bodies, "a", 20)  # 50 of 100: as much as is left
    await second.send(1)
    refusal = await second.refusal()
    assert (refusal.status, refusal.reason, refusal.retry_after) == (429, "too_many_bodies", 1)
    assert "take 51 bytes; only 49" in refusal.message
    assert bodies.in_memory == 30  # what was refused is given back
    other = await begun(bodies, "b", 30)
    await other.send(1, more=False)
    assert len(await other.task) == 31
    await first.send(1, more=False)
    assert (len(await first.task), bodies.in_memory, bodies._held_bytes) == (31, 0, {})


async def test_bodies_that_wait_for_an_engine_count_for_their_client() -> None:
    bodies = make()
    bodies.count(60, "a")
    assert (await Upload(bodies, "a").refusal()).status == 429
    other = await begun(bodies, "b", 15)
    await other.send(1, more=False)
    assert len(await other.task) == 16
    bodies.count(-60, "a")
    assert (bodies.in_memory, bodies._held_bytes) == (0, {})


async def test_a_client_that_leaves_gives_its_room_back() -> None:
    bodies = make()
    upload = await begun(bodies, "a", 40)
    upload._parts.put_nowait({"type": "http.disconnect"})
    assert (await upload.refusal()).reason == "incomplete_body"
    ended = await begun(bodies, "a", 40)
    ended.task.cancel()
    await asyncio.wait((ended.task,))
    assert (ended.task.cancelled(), bodies.in_memory, bodies._held_bytes) == (True, 0, {})


def test_a_body_in_tiny_pieces_takes_no_more_memory_than_its_bytes() -> None:
    """An object for each piece of two bytes would take forty times what is counted for them."""
    pieces, left = 50_000, [50_000]

    async def receive():
        left[0] -= 1
        return {"type": "http.request", "body": bytes((left[0] & 127, 1)), "more_body": left[0] > 0}

    async def run():
        tracemalloc.start()
        try:
            body = await Bodies(1 << 20, GatewayConfig()).read(JSON, receive)
            return body, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    body, peak = asyncio.run(run())
    assert body == b"".join(bytes((n & 127, 1)) for n in reversed(range(pieces)))
    assert peak < 4 * len(body)
