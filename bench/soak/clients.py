"""Requests at a steady rate, and what the gateway adds to an engine's own answer."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any, Final

import aiohttp

from bench.soak.served import EngineAddress
from tests.support.gateway import CHAT, chat, image_part

#: A request that is not answered for so long hangs: the longest fault is over long before.
_HANG: Final = 120.0


class Clients:
    """One request each 1/rate seconds, whether those before were answered or not.

    Every third has an image, every fifth streams. ``outcomes`` counts statuses, ``hung`` and
    ``lost (ERROR)``; ``added`` are milliseconds of the gateway, since they were last taken.
    """

    def __init__(self, port: int, rate: float) -> None:
        self._url, self._rate = f"http://127.0.0.1:{port}", rate
        self.outcomes: Counter[str] = Counter()
        self.added: list[float] = []
        self.sent = self.compared = 0
        self._open: set[asyncio.Task[None]] = set()
        self._image = image_part(448, 448)

    async def __aenter__(self) -> Clients:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=_HANG)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        # A new connection each time: engine and gateway are compared with the same set-up.
        fresh = aiohttp.TCPConnector(force_close=True)
        self._fresh = aiohttp.ClientSession(connector=fresh, timeout=timeout)
        async with self._session.get(f"{self._url}/v1/models") as answer:
            self._model = (await answer.json(content_type=None))["data"][0]["id"]
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*self._open)
        await self._session.close()
        await self._fresh.close()

    async def run(self, ends: float) -> None:
        """Until then, by the clock: a late turn does not lower the rate."""
        began = time.monotonic()
        while time.monotonic() < ends:
            task = asyncio.ensure_future(self._ask(self.sent))
            self._open.add(task)
            task.add_done_callback(self._open.discard)
            self.sent += 1
            await asyncio.sleep(max(0.0, began + self.sent / self._rate - time.monotonic()))

    async def compare(self, engine: EngineAddress) -> None:
        """The same small request to an engine itself and through the gateway."""
        body = self._body(2)
        self.compared += 1
        headers = {"Authorization": f"Bearer {engine.key}"} if engine.key else {}
        try:
            direct = await self._timed(f"http://127.0.0.1:{engine.port}", body, headers)
            through = await self._timed(self._url, body, {})
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            return
        if direct is not None and through is not None:
            self.added.append(through - direct)

    async def _ask(self, number: int) -> None:
        try:
            async with self._session.post(self._url + CHAT, json=self._body(number)) as answer:
                await answer.read()
                self.outcomes[str(answer.status)] += 1
        except asyncio.TimeoutError:
            self.outcomes["hung"] += 1
        except (aiohttp.ClientError, OSError) as exc:
            self.outcomes[f"lost ({type(exc).__name__})"] += 1

    async def _timed(self, url: str, body: dict[str, Any], headers: dict[str, str]) -> float | None:
        began = time.monotonic()
        async with self._fresh.post(url + CHAT, json=body, headers=headers) as answer:
            await answer.read()
            return (time.monotonic() - began) * 1000 if answer.status == 200 else None

    def _body(self, number: int) -> dict[str, Any]:
        parts = [self._image] if number % 3 == 0 else []
        body = chat(*parts, max_tokens=4, stream=number % 5 == 0)
        return {**body, "model": self._model}
