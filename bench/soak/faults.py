"""What goes wrong during a soak, one after the other, for ever."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import random
import signal
from collections.abc import Awaitable, Callable
from typing import Final

from bench.soak.served import Soaked
from tests.support.gateway import picture
from tests.support.mutations import Mutator

_HEAD: Final = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
)
_STOPPED_SECONDS: Final = 15.0
_CONNECTIONS: Final = 200
_BODIES: Final = 50
#: Times 50 malformed bodies before the clock starts.
_WARM_UP: Final = 16
#: More than the gateway decodes at a time.
_AT_ONCE: Final = 8


class Faults:
    """Each in its turn; an engine is killed in every fifth."""

    def __init__(self, served: Soaked, seed: int = 1) -> None:
        self._served, self._rng = served, random.Random(seed)
        self._mutator = Mutator(seed, large=False)
        self.done: list[str] = []
        self.busy = False
        self._kinds: tuple[tuple[str, Callable[[], Awaitable[None]]], ...] = (
            ("engine killed", self._killed),
            ("half bodies, clients gone", self._half_bodies),
            ("idle and half-open connections", self._half_open),
            ("engine stopped for 15 s", self._stopped),
            ("malformed bodies", self._malformed),
        )

    async def run(self, every: float, ends: float) -> None:
        """One each so many seconds, the first after that time."""
        loop = asyncio.get_running_loop()
        turn = loop.time()
        for name, act in itertools.cycle(self._kinds):
            turn += every
            if turn > ends:
                return
            await asyncio.sleep(max(0.0, turn - loop.time()))
            self.busy = True
            await act()
            self.busy = False
            self.done.append(name)

    async def _killed(self) -> None:
        if engines := self._served.engines():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._rng.choice(engines).pid, signal.SIGKILL)

    async def _stopped(self) -> None:
        if engines := self._served.engines():
            pid = self._rng.choice(engines).pid
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(_STOPPED_SECONDS)
                os.kill(pid, signal.SIGCONT)

    async def _half_bodies(self) -> None:
        await self._send(_HEAD + b'Content-Length: 100000\r\n\r\n{"messages":[', _BODIES)

    async def _half_open(self) -> None:
        await self._send(b"GET /v1/mod", _CONNECTIONS)
        await self._send(b"", _CONNECTIONS)

    async def warm_up(self) -> None:
        """Rare requests need a thread, and memory that is kept: pictures that are resized."""
        for _ in range(_WARM_UP):
            await self._malformed()
        await self._resized()

    async def _resized(self) -> None:
        """Two of the mutations' largest pictures share the plan's units, where no knob says how."""
        data = base64.b64encode(picture(1792, 1344)).decode()
        source = {"type": "base64", "media_type": "image/png", "data": data}
        image = {"type": "image", "source": source}
        message = {"role": "user", "content": [image, image]}
        body = {"model": "m", "max_tokens": 1, "messages": [message]}
        whole = _whole("/v1/messages", json.dumps(body).encode())
        await asyncio.gather(*(self._sent(whole) for _ in range(_AT_ONCE)))

    async def _malformed(self) -> None:
        requests = [self._mutator.request() for _ in range(_BODIES)]
        await asyncio.gather(*(self._sent(_whole(path, raw)) for path, raw in requests))

    async def _send(self, data: bytes, times: int) -> None:
        """On so many connections at once; each is reset after a second."""
        await asyncio.gather(*(self._sent(data) for _ in range(times)))

    async def _sent(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", self._served.port)
            writer.write(data)
            await asyncio.sleep(1.0)
            writer.transport.abort()


def _whole(path: str, raw: bytes) -> bytes:
    head = _HEAD.replace(b"/v1/chat/completions", path.encode())
    return head + b"Content-Length: %d\r\n\r\n" % len(raw) + raw
