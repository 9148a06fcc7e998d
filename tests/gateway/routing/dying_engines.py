"""Engines that die of a poisonous request."""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager
from itertools import chain

from tests.support.gateway import (
    DONE,
    EVENT,
    Answer,
    Recorder,
    ask,
    call,
    chat,
    gateway,
    stream,
)
from tests.virtual_time import settled

POISON = "poison"
#: LMDeploy's answer where its PyTorch engine's loop has ended.
UNAVAILABLE = (
    b'{"message":"The inference engine is unavailable.","type":"server_error","code":503,'
    b'"param":null,"object":"error"}'
)


class DyingEngines:
    """Engines that hold every request until `release`, and die of a poisonous one.

    As a process does: all that it had breaks off, and nothing listens any more. Or only as a
    PyTorch engine's loop: its server answers for it, once and for all.
    """

    def __init__(self, engines: int, *, loops: bool = False) -> None:
        self.app, self.recorder = gateway(engines=engines, recorder=Recorder(self._answer))
        for engine in self.app.engines:
            engine.succeeded()
        self._waiting: dict[int, list[asyncio.Future[None]]] = {n: [] for n in range(engines)}
        #: Each request with the engine that had it.
        self.received: list[tuple[int, str]] = []
        self._released, self._loops = False, loops
        self.dead = self.recorder.failing if loops else self.recorder.down

    async def _answer(self, engine, path, body):
        if engine.index in self.recorder.failing:
            return stream(b'data: {"error": ' + UNAVAILABLE + b"}\n\n", DONE)
        self.received.append((engine.index, str(body)))
        answered = asyncio.get_running_loop().create_future()
        self._waiting[engine.index].append(answered)
        if POISON in str(body):
            self.dead.add(engine.index)
            for other in self._waiting[engine.index]:
                other.set_exception(OSError("reset"))
        elif self._released:
            answered.set_result(None)
        try:
            await answered
        except OSError as exc:
            return Answer(UNAVAILABLE, status=503) if self._loops else exc
        return stream(EVENT, DONE)

    def release(self) -> None:
        """All that wait are answered, and those to come at once."""
        self._released = True
        for answered in chain(*self._waiting.values()):
            if not answered.done():
                answered.set_result(None)

    async def send(self, text: str) -> asyncio.Task:
        """A request that is at an engine from now on."""
        body = chat({"type": "text", "text": text}, stream=True)
        task = asyncio.ensure_future(call(self.app, body=body))
        await settled()
        return task

    def times(self, text: str) -> list[int]:
        """The engines that had a request, in order of their numbers."""
        return sorted(index for index, body in self.received if f'"{text}"' in body)


def deaths(app, name: str = "engine_deaths") -> int:
    """A counter of the first engine."""
    page = ask(app, "/metrics").body.decode()
    found = re.search(rf'turbofit_gateway_{name}_total{{engine="0"}} (\d+)', page)
    return int(found[1]) if found else 0


@asynccontextmanager
async def serving(app):
    """The app watches its engines meanwhile."""
    await app.startup()
    try:
        yield
    finally:
        await app.shutdown()
