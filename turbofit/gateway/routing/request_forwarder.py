"""From a prepared request to its answer: a place at an engine, another one where that is gone."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from turbofit.core.process.log import LazyLogger
from turbofit.gateway.limits.gate import Cost
from turbofit.gateway.routing.deny_file import Fingerprint
from turbofit.gateway.routing.deny_list import Present
from turbofit.gateway.routing.exchange import EngineDied, Exchange, Place
from turbofit.gateway.routing.upstream import Unreachable

if TYPE_CHECKING:
    from turbofit.gateway.http.asgi import Send
    from turbofit.gateway.http.body import Bodies
    from turbofit.gateway.http.metrics import Metrics
    from turbofit.gateway.routing.admission import Admission
    from turbofit.gateway.routing.deny_list import DenyList
    from turbofit.gateway.routing.engines import Chooser, Fleet, RoutedEngine
    from turbofit.gateway.routing.health import Monitor
    from turbofit.gateway.routing.request_context import RequestContext
    from turbofit.gateway.routing.upstream import Upstream

__all__ = ["RequestForwarder"]

_LOG: Final = LazyLogger(__name__)

#: Engines that may not be reached, one after the other: with the gateway's own network gone each
#: would cost its client a timeout.
_MOST_ENGINES: Final = 16
#: Seconds that a turn alone waits for what the engine has to begin its answer, and between looks.
_LONGEST_WAIT, _LOOK = 30.0, 0.02


@dataclass
class RequestForwarder:
    """Forwards requests to engines.

    A request goes to another engine where its own could not be reached: that one never had it, and
    gets nothing new. It is sent again once, where nothing was passed on yet and nobody died: its
    machine vanished, or it was drained. Who was at a death gets 503 and may ask again. An engine
    that answers, with an error too, has answered, but for LMDeploy's 503 of an engine whose loop
    has ended.
    """

    fleet: Fleet
    admission: Admission
    upstream: Upstream
    #: Told of failures.
    monitor: Monitor
    deny_list: DenyList
    #: Counts the bodies that are kept.
    bodies: Bodies
    metrics: Metrics

    async def forward(self, request: RequestContext, choose: Chooser | None, send: Send) -> None:
        """Wait for room, send the request to an engine, and pass the answer on.

        Raises:
            Refusal: no room, no engine, its engine ended, or it is refused.
        """
        assert request.route is not None
        if request.body:
            fingerprint = Fingerprint(self.deny_list.file.key, request.route.path, request.body)
            request.present = Present(fingerprint, request.who)
        unreached, again = 0, False
        while unreached < _MOST_ENGINES:
            place = await self._take(request, choose)
            try:
                request.engine = place.engine
                request.outcome = exchange = Exchange(self, request, place, send, last=again)
                await exchange.run()
            except Unreachable as exc:
                await self._unreachable(place.engine, exc)
                unreached += 1
            except EngineDied as exc:
                await self._broke_off(request, exc, again=again)
                again = True
            else:
                return
        raise self.fleet.dead()

    async def _unreachable(self, engine: RoutedEngine, exc: Unreachable) -> None:
        """Nobody was asked: whoever comes next gets another engine."""
        self.monitor.gone(engine, vanished=exc.vanished)
        self.metrics.count("engine_failures_total", f"engine={engine.index}")
        death = self.deny_list.nothing_listens(engine) if exc.ended else None
        if death is not None and death.told is not None:
            await death.told  # an equal request may be what it died of

    async def _broke_off(self, request: RequestContext, died: EngineDied, *, again: bool) -> None:
        """Return where the request may be sent again.

        Raises:
            Refusal: it may not.
        """
        outcome = request.outcome
        assert outcome is not None
        if not self.fleet.open:
            died.retry_after = self.fleet.retry_seconds
        if outcome.death is not None and outcome.death.told is not None:
            await outcome.death.told
        if outcome.death is not None or again or request.forgotten or not self.fleet.open:
            raise died
        self.metrics.count("retried_total")
        _LOG.info("request %s is sent to another engine", request.id)

    async def _take(self, request: RequestContext, choose: Chooser | None) -> Place:
        """A place at an engine, beside others, or in a suspect's turn.

        Raises:
            Refusal: no room, no engine, or it is refused.
        """
        prepared, present = request.prepared, request.present
        while True:
            turn = None if present is None else await self.deny_list.turn(present)
            cost = Cost(
                units=prepared.units,
                host_bytes=prepared.host_bytes,
                tokens=prepared.kv_tokens,
                copies=prepared.copies,
            )
            engine = await self.admission.admit(request.who, cost, choose, turn)
            place = Place(self, request, engine, cost, turn)
            try:
                # Much may have become known while it waited.
                now = None if present is None else await self.deny_list.turn(present)
                same = (now and now.name) == (turn and turn.name)
                if same and turn is not None and now is not None:
                    turn.alone |= now.alone
                    turn.longer |= now.longer
                if same and turn is not None and turn.alone:
                    await _until_others_have_begun(engine)
            except BaseException:
                place.leave()
                raise
            if same:
                break
            place.leave()
        if present is not None:
            present.turn = turn
        return place

    def forget(self, request: RequestContext) -> None:
        """No more need of the body: a stream may last for minutes, and need not hold megabytes."""
        if request.bytes_in and not request.forgotten:
            self.bodies.keep(-request.bytes_in, request.who)
        request.forgotten, request.body = True, b""


async def _until_others_have_begun(engine: RoutedEngine) -> None:
    """Wait until each request that an engine has answers: it gets no others meanwhile."""
    until = time.monotonic() + _LONGEST_WAIT
    while time.monotonic() < until and any(not one.begun for one in engine.in_flight):
        await asyncio.sleep(_LOOK)
