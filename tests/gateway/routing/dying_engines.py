"""Engines that die of a poisonous request."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

from tests.support.gateway import (
    DONE,
    EVENT,
    Answer,
    Recorder,
    Reply,
    call,
    chat,
    gateway,
    stream,
)
from tests.support.waiting import HANG

POISON = "poison"
#: LMDeploy's answer where its PyTorch engine's loop has ended.
UNAVAILABLE = (
    b'{"message":"The inference engine is unavailable.","type":"server_error","code":503,'
    b'"param":null,"object":"error"}'
)


def broken(*_):
    return OSError("reset")


def vanish(*_):
    return OSError(110, "ETIMEDOUT")


class DyingEngines:
    """Engines that hold every request until `release`, and die of a poisonous one.

    As a process does: all that it had breaks off, and nothing listens any more. Or only as a
    PyTorch engine's loop: its server answers for it, once and for all.
    """

    def __init__(self, engines: int, *, loops: bool = False, **config) -> None:
        self.app, self.recorder = gateway(
            engines=engines, recorder=Recorder(self._answer), queue_seconds=HANG, **config
        )
        for engine in self.app.engines:
            engine.succeeded()
        self.held: dict[int, list[asyncio.Future[None]]] = {}
        self.received: dict[int, list[str]] = {}
        self._released, self._loops = False, loops
        #: Poisonous requests are held like others.
        self.patient = False
        self._changed = asyncio.Event()

    @property
    def dead(self) -> set[int]:
        return self.recorder.failing if self._loops else self.recorder.down

    async def _answer(self, engine, path, body):
        if engine.index in self.recorder.failing:
            return stream(b'data: {"error": ' + UNAVAILABLE + b"}\n\n", DONE)
        text = str(body)
        self.received.setdefault(engine.index, []).append(text)
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
            return Answer(UNAVAILABLE, status=503) if self._loops else exc
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
            index
            for index in sorted(self.received)
            for one in self.received[index]
            if f'"{text}"' in one
        ]

    async def settled(self, *tasks: asyncio.Task) -> list:
        return await asyncio.wait_for(asyncio.gather(*tasks), HANG)


def metric(page: Reply, name: str, label: str = "") -> int:
    for line in page.body.decode().splitlines():
        if line.startswith(f"turbofit_gateway_{name}{label} "):
            return int(line.rpartition(" ")[2])
    return 0


@asynccontextmanager
async def serving(app):
    """The app watches its engines meanwhile."""
    await app.startup()
    try:
        yield
    finally:
        await app.shutdown()
