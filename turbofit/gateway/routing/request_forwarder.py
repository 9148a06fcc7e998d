"""From a prepared request to its answer: a place at an engine, and another one where that dies."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from turbofit.core.process.log import LazyLogger
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.cost import Cost
from turbofit.gateway.quarantine.identity import LEFT_SECONDS
from turbofit.gateway.routing.admission import dead
from turbofit.gateway.routing.equal_requests import EqualRequests
from turbofit.gateway.routing.exchange import EngineDied, Exchange
from turbofit.gateway.routing.quarantine import now
from turbofit.gateway.routing.request_context import sent_headers
from turbofit.gateway.routing.retry import Retries, withheld
from turbofit.gateway.routing.upstream import Unreachable

if TYPE_CHECKING:
    from turbofit.gateway.http.asgi import Send
    from turbofit.gateway.http.body import Bodies
    from turbofit.gateway.http.metrics import Metrics
    from turbofit.gateway.http.prepare import PreparedBody
    from turbofit.gateway.routing.admission import Admission
    from turbofit.gateway.routing.engines import Chooser, RoutedEngine
    from turbofit.gateway.routing.fleet import Fleet
    from turbofit.gateway.routing.health import Monitor
    from turbofit.gateway.routing.quarantine import Quarantine
    from turbofit.gateway.routing.request_context import RequestContext
    from turbofit.gateway.routing.trials import Trials
    from turbofit.gateway.routing.upstream import Upstream

__all__ = ["RequestForwarder"]

_LOG: Final = LazyLogger(__name__)

#: Engines that may not be reached, one after the other: with the gateway's own network gone each
#: would cost its client a timeout.
_MOST_ENGINES: Final = 16
#: Seconds in which the connections of an engine that has ended break, and between two looks.
_BREAKS, _LOOK = 0.5, 0.01


class RequestForwarder:
    """Forwards requests to engines, and retries.

    A request of whose answer nothing was passed on yet may be sent again, to an engine that did not
    have it, where one breaks off or is taken out (`retry` says when, `trials` where); what the
    client sees is a longer wait. An engine that answers, with an error too, has answered, but for
    LMDeploy's 503 of an engine whose loop has ended. One that cannot be reached never had the
    request, and does not count as a try: it gets nothing new at once, so that none is met twice.

    Args:
        fleet: the engines.
        admission: their doors.
        upstream: the connections to them.
        monitor: told of failures.
        trials: where suspects wait.
        quarantine: knows the suspects.
        bodies: which count the bodies that are kept.
        metrics: which count failures and retries.
    """

    def __init__(  # noqa: PLR0913 - a constructor
        self,
        fleet: Fleet,
        admission: Admission,
        upstream: Upstream,
        monitor: Monitor,
        trials: Trials,
        quarantine: Quarantine,
        bodies: Bodies,
        metrics: Metrics,
    ) -> None:
        self._fleet, self._admission, self._upstream = fleet, admission, upstream
        self._monitor, self._bodies, self._metrics = monitor, bodies, metrics
        self._trials, self._quarantine = trials, quarantine
        self._equal = EqualRequests(now, admission.pump)

    async def forward(self, request: RequestContext, choose: Chooser | None, send: Send) -> None:
        """Wait for room, send the request to an engine, and pass the answer on.

        Raises:
            Refusal: no room, no engine, none that did not break off, or it was convicted before.
        """
        self._quarantine.identify(request)
        self._trials.note_client(request.who)
        avoid: list[RoutedEngine] = []
        retries = Retries()
        while True:
            if len(avoid) == _MOST_ENGINES:
                raise dead(self._fleet)
            place = None
            while place is None:
                place = await self._take(request, choose, avoid, again=retries.deaths > 0)
            engine = place.engine
            avoid.append(engine)
            try:
                await self._exchange(request, place, avoid, send, last=retries.last)
            except Unreachable as exc:
                self._monitor.gone(engine, vanished=exc.vanished)
                self._metrics.count("engine_failures_total", f"engine={engine.label}")
                if exc.ended:
                    await self._quarantine.unreachable(engine)
                    await _wait_until_suspected(engine)
                self._let_equal_ones_go(request)
            except EngineDied as exc:
                await self._broke_off(request, exc, retries, avoid)
            else:
                await self._ended(request)
                return

    async def _ended(self, request: RequestContext) -> None:
        """An engine has answered a request, or died, or was given up, while it had it."""
        await self._quarantine.ended(request)
        self._let_equal_ones_go(request)

    def _let_equal_ones_go(self, request: RequestContext) -> None:
        """It is known what an engine makes of a request: equal ones that wait may go on."""
        outcome, engine = request.outcome, request.engine
        if request.identity is None or outcome is None or engine is None:
            return
        if outcome.answered and not outcome.broken and not outcome.failed:
            self._equal.answered(request.identity.sketch)
        else:
            self._lost(request, engine)

    def _lost(self, request: RequestContext, engine: RoutedEngine) -> None:
        """An engine does not answer it."""
        if request.identity is not None:
            self._equal.lost(request.identity.sketch, engine)

    async def _broke_off(
        self, request: RequestContext, died: EngineDied, retries: Retries, avoid: list[RoutedEngine]
    ) -> None:
        """Return where the request may be sent again.

        Raises:
            Refusal: it may not.
        """
        outcome, engine = request.outcome, avoid[-1]
        assert outcome is not None
        why = retries.why_withheld(outcome, self._fleet)
        await self._ended(request)
        # A request that this death convicts is refused when it comes again: the engine's supervisor
        # may yet say that somebody killed the engine.
        if why is None and outcome.death is not None and await self._quarantine.convicts(request):
            why = "second_death"
        if request.gone or not self._fleet.others(avoid):
            died.retry_after = self._fleet.retry_seconds
            raise died
        if why is not None:
            self._metrics.count("not_retried_total", f"why={why}")
            raise withheld(why)
        if request.forgotten:
            raise died
        self._metrics.count("retried_total")
        _LOG.info("request %s is sent to another engine: %s broke off", request.id, engine.label)

    async def _take(
        self,
        request: RequestContext,
        choose: Chooser | None,
        avoid: list[RoutedEngine],
        *,
        again: bool,
    ) -> _Place | None:
        """A place at an engine, beside others, or alone for a suspect.

        None where that changed while it waited: an engine died of an equal request, or answered
        one. Without another such event the next place is the right one.

        Raises:
            Refusal: no room, no engine, or it is convicted.
        """
        cost = _cost(request.prepared)
        suspected = await self._quarantine.suspected(request, again=again)
        if suspected is not None:
            return await self._take_alone(request, cost, suspected, avoid)
        if request.identity is not None and len(self._fleet) > 1:
            choose = self._equal.chooser(request.identity.sketch, choose)
        engine = await self._admission.admit(request.who, cost, choose, avoid)
        place, innocent = _Place(engine, cost, self._admission), False
        try:
            innocent = await self._quarantine.suspected(request, again=False) is None
        finally:
            if not innocent:
                place.leave()
                self._lost(request, engine)
        return place if innocent else None

    async def _take_alone(
        self, request: RequestContext, cost: Cost, suspected: str, avoid: list[RoutedEngine]
    ) -> _Place | None:
        """An engine for a suspect, which has it for itself; None where it is no suspect any more.

        Raises:
            Refusal: it is convicted, or its turn does not come.
        """
        engine = await self._trials.admit(request.who, suspected, cost, avoid, request.t0)
        try:
            # An equal one gives its engine back before it is known what became of that.
            self._quarantine.refuse_convicted(suspected)
        except Refusal:
            if engine is not None:
                self._trials.release(engine, cost)
            raise
        if engine is None:
            return None
        to_end = self._quarantine.runs_to_end(suspected)
        return _Place(engine, cost, self._trials, to_end=to_end)

    def forget(self, request: RequestContext) -> None:
        """No more need of the body: a stream may last for minutes, and need not hold megabytes."""
        if request.bytes_in and not request.forgotten:
            self._bodies.keep(-request.bytes_in, request.who)
        request.forgotten, request.body = True, b""

    async def _exchange(
        self,
        request: RequestContext,
        place: _Place,
        avoid: list[RoutedEngine],
        send: Send,
        *,
        last: bool,
    ) -> None:
        """To one engine; the room taken there is given back exactly once."""
        engine = place.engine

        def sent() -> None:
            # Kept only where another engine could be given it, and while bodies leave room.
            if last or not self._fleet.others(avoid) or not self._bodies.roomy:
                self.forget(request)

        def first() -> None:
            # Of several copies the first byte tells only about one.
            if request.prepared.copies == 1:
                place.begin()

        exchange = Exchange(
            self._upstream,
            engine,
            request,
            send,
            sent,
            lambda: self.forget(request),
            first,
            lambda: self._monitor.doubt(engine),
        )
        request.engine, request.outcome = engine, exchange.outcome
        if request.identity is not None:
            self._equal.sent(request.identity.sketch, engine, exchange)
        unanswered = False
        try:
            await exchange.run(request.body, sent_headers(request))
        except asyncio.CancelledError:
            if exchange.outcome.broken:
                await self._quarantine.ended(request)
            else:
                self._quarantine.left(request)
            unanswered = not exchange.outcome.answered
            raise
        finally:
            # A connection may break while the engine lives, and goes on with the request.
            unanswered |= exchange.outcome.broken and not exchange.outcome.answered
            place.leave(LEFT_SECONDS if unanswered or exchange.outcome.stuck else 0.0)
            self._trials.pump()
            if exchange.outcome.broken or exchange.outcome.failed:
                self._monitor.suspect(engine)
                # One that broke off before a byte came is starting again, or about to: where others
                # are up, it would be asked first, having nothing, and break off every request.
                unbegun = exchange.outcome.broken and not exchange.outcome.started
                unbegun = unbegun and not exchange.outcome.stuck
                if exchange.outcome.vanished or (unbegun and self._fleet.others(avoid)):
                    self._monitor.doubt(engine)
                self._metrics.count("engine_failures_total", f"engine={engine.label}")


async def _wait_until_suspected(engine: RoutedEngine) -> None:
    """Wait until what an engine had when it ended has broken off, and is suspected.

    A request that found nothing there may be equal to it, and goes on to another engine.
    """
    until = now() + _BREAKS
    while engine.in_flight and now() < until:
        await asyncio.sleep(_LOOK)
    await asyncio.sleep(_LOOK)


class _Place:
    """A place at an engine.

    Args:
        engine: where.
        cost: what was taken there.
        door: takes it back.
        to_end: whether the answer must end first, not only begin.
    """

    __slots__ = ("_cost", "_door", "_to_end", "engine", "left")

    def __init__(
        self, engine: RoutedEngine, cost: Cost, door: Admission | Trials, *, to_end: bool = False
    ) -> None:
        self.engine, self._cost, self._door, self._to_end = engine, cost, door, to_end
        self.left = False

    def begin(self) -> None:
        """The answer has begun: give back what it holds no more."""
        if not self.left and not self._to_end:
            self.left = self._door.begin(self.engine, self._cost)

    def leave(self, after: float = 0.0) -> None:
        """Give everything back, once; what the engine may still hold after so many seconds."""
        if not self.left:
            self.left = True
            self._door.release(self.engine, self._cost, after)


def _cost(prepared: PreparedBody) -> Cost:
    """What a request will hold: an object for each try, by which it is known at its engine."""
    return Cost(
        units=prepared.units,
        host_bytes=prepared.host_bytes,
        tokens=prepared.kv_tokens,
        copies=prepared.copies,
    )
