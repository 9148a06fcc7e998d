"""Watches whether engines answer completions: requests of clients, and probes in between.

LMDeploy's own ``/health`` can be 200 while every request fails or hangs; a completion shows this.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable
from typing import Final

from turbofit.core.process.log import LazyLogger
from turbofit.core.struct import Document
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.routing.engines import Outage, RoutedEngine
from turbofit.gateway.upstream import HEALTH_SECONDS, Upstream

_LOG: Final = LazyLogger(__name__)

_TICK: Final = 0.5
_FAILURES: Final = 3
#: The counters of all tokens that an engine has read and written, on its metrics page.
_TOKENS: Final = re.compile(
    r"^lmdeploy:(?:prompt|generation)_tokens_total(?:\{.*\})? "
    r"(\d{1,18}(?:\.\d+)?(?:e[+-]?\d{1,2})?)$",
    re.MULTILINE,
)


def healthy(engines: Iterable[RoutedEngine]) -> bool:
    """Return whether at least one engine answers completions and takes new requests."""
    return any(engine.serves for engine in engines)


def trouble(outage: Outage | None, word: str = "status") -> Document:
    """Return the part of `/health` that says why no engine serves.

    ``word`` is the key of the state.
    """
    if outage is None:
        return {word: "unavailable"}
    return {word: "resting", "message": outage.message}


class Monitor:
    """Probes engines; takes an engine that fails out of service, and brings it back.

    An engine is probed with a completion of one text token if it has been idle for long, if
    something failed, or if it owes answers but sends nothing. After three failures in a row the
    engine gets no more requests, and its requests end. One success brings the engine back. Both
    times ``changed`` is called.

    An engine that does not answer a probe in time may only be slow. It is taken out of service only
    if it has sent nothing for `GatewayConfig.hung_seconds`, and its own count of tokens has not
    grown.
    """

    def __init__(
        self,
        engines: Iterable[RoutedEngine],
        upstream: Upstream,
        config: GatewayConfig,
        changed: Callable[[], None],
    ) -> None:
        self._upstream, self._config, self._changed = upstream, config, changed
        self._looks = {engine: asyncio.Event() for engine in engines}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = False

    def start(self) -> None:
        self._tasks = [asyncio.ensure_future(self._watch(engine)) for engine in self._looks]

    async def stop(self) -> None:
        # Before Python 3.12 `wait_for` may swallow a cancellation, so a flag ends the tasks, too.
        self._stopped = True
        self.look()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def look(self) -> None:
        """Let each engine's watch check its engine now."""
        for event in self._looks.values():
            event.set()

    def suspect(self, engine: RoutedEngine) -> None:
        """Note that a request failed at the engine, and probe the engine soon."""
        engine.suspect = True
        self._looks[engine].set()

    def ask_now(self, engine: RoutedEngine) -> None:
        """Probe the engine at once, without the pause after failures."""
        engine.last_check = float("-inf")
        self.suspect(engine)

    def doubt(self, engine: RoutedEngine) -> None:
        """Send an engine no new requests until it answers a probe.

        Call this method if the engine broke off an answer, was not reached, or has ended its loop.
        Running requests continue, since the engine may still answer some.
        """
        if engine.up:
            engine.up = False
            _LOG.info("engine %s is in doubt: it gets no new requests", engine.index)
            self._changed()
        self.suspect(engine)

    async def _watch(self, engine: RoutedEngine) -> None:
        """Check an engine twice a second, and at each `look`, until the monitor stops."""
        look, loop = self._looks[engine], asyncio.get_running_loop()
        while not self._stopped:
            look.clear()
            # With `gather` neither a bug of ours nor a cancellation inside a probe ends the watch.
            (exc,) = await asyncio.gather(self._check(engine), return_exceptions=True)
            if exc is not None:
                loop.call_exception_handler({"message": "a bug in the watch", "exception": exc})
            tick = loop.call_later(_TICK, look.set)
            await look.wait()
            tick.cancel()

    async def _check(self, engine: RoutedEngine) -> None:
        """Probe an engine if a probe is due."""
        now, soon = time.monotonic(), self._config.retry_seconds
        stalled = engine.outstanding > 0 and now - engine.silent_since > self._config.stall_seconds
        idle = now - engine.last_success > self._config.idle_seconds
        pause = soon if engine.failures else min(1.0, soon)
        if now - engine.last_check >= pause and (
            engine.suspect or stalled or idle or not engine.up
        ):
            await self._ask(engine)

    async def _ask(self, engine: RoutedEngine) -> None:
        """Probe an engine, and bring it back or count a failure."""
        began = engine.last_check = time.monotonic()
        if not engine.owes:
            engine.asked_at = began
        engine.check_open, in_time = True, True
        try:
            works = await asyncio.wait_for(self._upstream.probe(engine), self._config.probe_seconds)
        except (asyncio.TimeoutError, TimeoutError):
            works = in_time = False
        if works and engine.dead_since(began):
            return  # the engine has died since its answer
        # A client's request may have succeeded during the probe.
        if works or (engine.up and engine.last_success > began):
            self._bring_back(engine)
            return
        if engine.in_flight and await self._moves(engine):
            engine.note_byte()  # the engine is slow, not stuck
            return
        engine.failures += 1
        engine.failed_at = min(engine.failed_at, time.monotonic())
        hung = time.monotonic() - engine.silent_since >= self._config.hung_seconds
        if engine.failures >= _FAILURES and (in_time or hung) and (engine.up or engine.in_flight):
            engine.up = False
            _LOG.info("engine %s is taken out after %d failures", engine.index, engine.failures)
            engine.abort_all()
            self._changed()

    async def _moves(self, engine: RoutedEngine) -> bool:
        """Return whether the engine has counted more tokens since a probe last failed."""
        page = await self._upstream.page(engine, "/metrics", HEALTH_SECONDS)
        before, engine.tokens = engine.tokens, sum(map(float, _TOKENS.findall(page)))
        return 0 < before < engine.tokens

    def _bring_back(self, engine: RoutedEngine) -> None:
        """Note that an engine works, and let it have requests again."""
        awaited = engine.suspect or not engine.serves
        engine.succeeded()
        if not engine.up:
            engine.up = True
            _LOG.info("engine %s answers: it gets requests", engine.index)
        if awaited:
            self._changed()
