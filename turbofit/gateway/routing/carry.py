"""From a prepared request to its answer: a place at an engine, and another one where that dies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.log import LazyLogger
from turbofit.gateway.limits.cost import Cost
from turbofit.gateway.routing.admission import dead
from turbofit.gateway.routing.call import sent_headers
from turbofit.gateway.routing.relay import EngineDied, Relay
from turbofit.gateway.routing.retry import Retries, withheld
from turbofit.gateway.routing.upstream import Unreachable

if TYPE_CHECKING:
    from turbofit.gateway.http.body import Bodies
    from turbofit.gateway.http.metrics import Metrics
    from turbofit.gateway.routing.admission import Admission
    from turbofit.gateway.routing.call import Call, Send
    from turbofit.gateway.routing.engines import Chooser, RoutedEngine
    from turbofit.gateway.routing.fleet import Fleet
    from turbofit.gateway.routing.health import Monitor
    from turbofit.gateway.routing.upstream import Upstream

__all__ = ["Carrier"]

_LOG: Final = LazyLogger(__name__)

#: Engines that may not be reached, one after the other: with the gateway's own network gone each
#: would cost its client a timeout.
_MOST_ENGINES: Final = 16


class Carrier:
    """Carries requests to engines.

    A request of whose answer nothing was passed on yet may be sent again, to an engine that did not
    have it, where one breaks off or is taken out (`retry` says when); what the client sees is a
    longer wait. An engine that answers, with an error too, has answered. One that cannot be reached
    never had the request, and does not count as a try: it is taken out at once, so that none is met
    twice.

    Args:
        fleet: the engines.
        admission: their doors.
        upstream: the connections to them.
        monitor: told of failures.
        bodies: which count the bodies that are kept.
        metrics: which count failures and retries.
    """

    def __init__(
        self,
        fleet: Fleet,
        admission: Admission,
        upstream: Upstream,
        monitor: Monitor,
        bodies: Bodies,
        metrics: Metrics,
    ) -> None:
        self._fleet, self._admission, self._upstream = fleet, admission, upstream
        self._monitor, self._bodies, self._metrics = monitor, bodies, metrics

    async def carry(self, call: Call, choose: Chooser | None, send: Send) -> None:
        """Wait for room, carry it to an engine, and pass its answer on.

        Raises:
            Refusal: no room, no engine, or none that did not break off.
        """
        prepared = call.prepared
        avoid: list[RoutedEngine] = []
        retries = Retries()
        while True:
            if len(avoid) == _MOST_ENGINES:
                raise dead(self._fleet)
            cost = Cost(
                units=prepared.units, host_bytes=prepared.host_bytes, suspect=retries.suspect
            )
            engine = await self._admission.admit(call.who, cost, choose, avoid)
            avoid.append(engine)
            if not self._fleet.knew(engine, call.routing_table):
                self._admission.release(engine, cost)
                continue
            try:
                await self._to(call, engine, cost, avoid, send, last=retries.last)
            except Unreachable as exc:
                self._monitor.gone(engine, vanished=exc.vanished)
                self._metrics.count("engine_failures_total", f"engine={engine.label}")
            except EngineDied:
                assert call.outcome is not None
                why = retries.lost(call.outcome, self._fleet)
                if call.gone or not self._fleet.others(avoid):
                    raise
                if why is not None:
                    self._metrics.count("not_retried_total", f"why={why}")
                    raise withheld(why) from None
                if call.forgotten:
                    raise
                self._metrics.count("retried_total")
                _LOG.info(
                    "request %s is sent to another engine: %s broke off", call.id, engine.label
                )
            else:
                return

    def forget(self, call: Call) -> None:
        """No more need of the body: a stream may last for minutes, and need not hold megabytes."""
        if call.bytes_in and not call.forgotten:
            self._bodies.keep(-call.bytes_in, call.who)
        call.forgotten, call.body = True, b""

    async def _to(
        self,
        call: Call,
        engine: RoutedEngine,
        cost: Cost,
        avoid: list[RoutedEngine],
        send: Send,
        *,
        last: bool,
    ) -> None:
        """To one engine; the room taken there is given back exactly once."""
        route = call.route
        assert route is not None
        held = [cost]

        def let_go() -> None:
            if held:
                self._admission.release(engine, held.pop())

        def sent() -> None:
            # Kept only where another engine could be given it, and while bodies leave room.
            if last or not self._fleet.others(avoid) or not self._bodies.roomy:
                self.forget(call)

        def first() -> None:
            # Of several copies the first byte tells only about one.
            to_end = (call.bounds.gate_to_end or engine.gate_to_end) and cost.units
            if call.prepared.copies == 1 and not to_end:
                let_go()

        relay = Relay(
            self._upstream,
            engine,
            route,
            call.prepared,
            send,
            call.out,
            sent,
            lambda: self.forget(call),
            first,
        )
        call.engine, call.outcome = engine, relay.outcome
        try:
            await relay.run(call.body, sent_headers(call))
        finally:
            let_go()
            if relay.outcome.broken or relay.outcome.failed:
                self._monitor.suspect(engine)
                # One that broke off before a byte came is starting again, or about to: where others
                # are up, it would be asked first, having nothing, and break off every request.
                unbegun = relay.outcome.broken and not relay.outcome.started
                if relay.outcome.vanished or (unbegun and self._fleet.others(avoid)):
                    self._monitor.doubt(engine)
                self._metrics.count("engine_failures_total", f"engine={engine.label}")
