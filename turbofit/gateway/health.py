"""Do completions still work? Seen from traffic, and asked for where there is none.

LMDeploy's own ``/health`` can be 200 while every request fails or hangs; a completion cannot.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from turbofit.gateway.engines import Engine

__all__ = ["Monitor", "healthy"]

_TICK: Final = 0.5
_FAILURES: Final = 3


def healthy(engines: Sequence[Engine]) -> bool:
    """Whether at least one engine answers completions."""
    return any(engine.up and engine.last_success > float("-inf") for engine in engines)


class Monitor:
    """Takes engines out and brings them back.

    An engine is probed with a completion of one text token when it has been idle for long, when
    something failed, and when it owes answers but sends nothing. Three failures in a row take it
    out, and end what still waits for it; one success brings it back.

    Args:
        engines: all of them.
        probe: asks one engine; False or an exception is a failure.
        changed: called when an engine was taken out or brought back.
        idle: seconds without a success after which to ask.
        stall: seconds without a byte, while answers are owed, after which to ask.
        retry: seconds between questions to an engine that failed.
        patience: seconds that an answer may take.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        probe: Callable[[Engine], Awaitable[bool]],
        changed: Callable[[], None],
        *,
        idle: float = 60.0,
        stall: float = 120.0,
        retry: float = 5.0,
        patience: float = 30.0,
    ) -> None:
        self._engines, self._probe, self._changed = tuple(engines), probe, changed
        self._idle, self._stall, self._retry, self._patience = idle, stall, retry, patience
        self._asked: dict[int, float] = {}
        self._asking: dict[int, asyncio.Task[None]] = {}
        self._poke = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def start(self) -> None:
        """Begin to watch, in the running loop."""
        self._task = asyncio.ensure_future(self._run())

    async def stop(self) -> None:
        """End the watch."""
        # Not by cancelling alone: before Python 3.12 `wait_for` may swallow that.
        self._stopped = True
        self._poke.set()
        tasks = [task for task in (self._task, *self._asking.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def suspect(self, engine: Engine, *, gone: bool = False) -> None:
        """A request failed there; ``gone`` where nothing even listens."""
        engine.suspect = True
        if gone and engine.up:
            engine.failures = _FAILURES
            self._take_out(engine)
        self._poke.set()

    async def _run(self) -> None:
        while not self._stopped:
            for engine in self._engines:
                if engine.index not in self._asking and self._due(engine):
                    self._asked[engine.index] = time.monotonic()
                    self._asking[engine.index] = asyncio.ensure_future(self._ask(engine))
            with suppress(asyncio.TimeoutError, TimeoutError):
                await asyncio.wait_for(self._poke.wait(), _TICK)
            self._poke.clear()

    def _due(self, engine: Engine) -> bool:
        now = time.monotonic()
        since = now - self._asked.get(engine.index, float("-inf"))
        if since < (self._retry if engine.failures else min(1.0, self._retry)):
            return False
        stalled = engine.outstanding > 0 and now - engine.last_byte > self._stall
        idle = now - engine.last_success > self._idle
        return engine.suspect or stalled or idle or not engine.up

    async def _ask(self, engine: Engine) -> None:
        began = time.monotonic()
        try:
            works = await asyncio.wait_for(self._probe(engine), self._patience)
        except (asyncio.TimeoutError, TimeoutError):
            works = False
        finally:
            self._asking.pop(engine.index, None)
        if works or (engine.up and engine.last_success > began):
            self._bring_back(engine)
            return
        engine.failures += 1
        if engine.failures >= _FAILURES and engine.up:
            self._take_out(engine)

    def _bring_back(self, engine: Engine) -> None:
        engine.succeeded()
        if not engine.up:
            engine.up = True
            self._changed()

    def _take_out(self, engine: Engine) -> None:
        engine.up = False
        engine.abort_all()
        self._changed()
