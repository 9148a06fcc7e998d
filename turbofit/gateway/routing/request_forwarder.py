"""From a prepared request to its answer: a place at an engine, another one where that is gone."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from turbofit.core.process.log import LazyLogger
from turbofit.gateway.limits.cost import Cost
from turbofit.gateway.routing.deny_file import Fingerprint
from turbofit.gateway.routing.exchange import EngineDied, Exchange
from turbofit.gateway.routing.request_context import sent_headers
from turbofit.gateway.routing.suspects import LEFT_SECONDS, Present
from turbofit.gateway.routing.upstream import Unreachable

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.gateway.http.asgi import Send
    from turbofit.gateway.http.body import Bodies
    from turbofit.gateway.http.metrics import Metrics
    from turbofit.gateway.routing.admission import Admission
    from turbofit.gateway.routing.deny_list import DenyList
    from turbofit.gateway.routing.engines import Chooser, Fleet, RoutedEngine
    from turbofit.gateway.routing.health import Monitor
    from turbofit.gateway.routing.request_context import RequestContext
    from turbofit.gateway.routing.suspects import Turn
    from turbofit.gateway.routing.upstream import Upstream

__all__ = ["RequestForwarder"]

_LOG: Final = LazyLogger(__name__)

#: Engines that may not be reached, one after the other: with the gateway's own network gone each
#: would cost its client a timeout.
_MOST_ENGINES: Final = 16
#: Seconds that a turn lasts on after the answer began, where that is not enough to clear it.
_LONGER: Final = 10.0
#: Seconds for which an engine gets nothing new after a client has left its turn alone there.
_ALONE_AFTER: Final = 1.0
#: Seconds that a turn alone waits for what the engine has to begin its answer, and between looks.
_LONGEST_WAIT, _LOOK = 30.0, 0.02


class RequestForwarder:
    """Forwards requests to engines.

    A request goes to another engine where its own could not be reached: that one never had it, and
    gets nothing new. It is sent again once, where nothing was passed on yet and nobody died: its
    machine vanished, or it was drained. Who was at a death gets 503 and may ask again. An engine
    that answers, with an error too, has answered, but for LMDeploy's 503 of an engine whose loop
    has ended.

    Args:
        fleet: the engines.
        admission: their doors.
        upstream: the connections to them.
        monitor: told of failures.
        deny_list: knows who is suspected and refused.
        bodies: which count the bodies that are kept.
        metrics: which count failures and retries.
    """

    def __init__(  # noqa: PLR0913 - a constructor
        self,
        fleet: Fleet,
        admission: Admission,
        upstream: Upstream,
        monitor: Monitor,
        deny_list: DenyList,
        bodies: Bodies,
        metrics: Metrics,
    ) -> None:
        self._fleet, self._admission, self._upstream = fleet, admission, upstream
        self._monitor, self._bodies, self._metrics = monitor, bodies, metrics
        self._deny_list = deny_list

    async def forward(self, request: RequestContext, choose: Chooser | None, send: Send) -> None:
        """Wait for room, send the request to an engine, and pass the answer on.

        Raises:
            Refusal: no room, no engine, its engine ended, or it is refused.
        """
        assert request.route is not None
        if request.body:
            fingerprint = Fingerprint(self._deny_list.file.key, request.route.path, request.body)
            request.present = Present(fingerprint, request.who)
        unreached, again = 0, False
        while unreached < _MOST_ENGINES:
            place = await self._take(request, choose)
            try:
                await self._exchange(request, place, send, last=again)
            except Unreachable as exc:
                await self._unreachable(place.engine, exc)
                unreached += 1
            except EngineDied as exc:
                await self._broke_off(request, exc, again=again)
                again = True
            else:
                return
        raise self._fleet.dead()

    async def _unreachable(self, engine: RoutedEngine, exc: Unreachable) -> None:
        """Nobody was asked: whoever comes next gets another engine."""
        self._monitor.gone(engine, vanished=exc.vanished)
        self._metrics.count("engine_failures_total", f"engine={engine.index}")
        death = self._deny_list.nothing_listens(engine) if exc.ended else None
        if death is not None and death.told is not None:
            await death.told  # an equal request may be what it died of

    async def _broke_off(self, request: RequestContext, died: EngineDied, *, again: bool) -> None:
        """Return where the request may be sent again.

        Raises:
            Refusal: it may not.
        """
        outcome = request.outcome
        assert outcome is not None
        if not self._fleet.open:
            died.retry_after = self._fleet.retry_seconds
        if outcome.death is not None and outcome.death.told is not None:
            await outcome.death.told
        if outcome.death is not None or again or request.forgotten or not self._fleet.open:
            raise died
        self._metrics.count("retried_total")
        _LOG.info("request %s is sent to another engine", request.id)

    async def _take(self, request: RequestContext, choose: Chooser | None) -> _Place:
        """A place at an engine, beside others, or in a suspect's turn.

        Raises:
            Refusal: no room, no engine, or it is refused.
        """
        prepared, present = request.prepared, request.present
        while True:
            turn = None if present is None else await self._deny_list.turn(present)
            cost = Cost(
                units=prepared.units,
                host_bytes=prepared.host_bytes,
                tokens=prepared.kv_tokens,
                copies=prepared.copies,
            )
            engine = await self._admission.admit(request.who, cost, choose, turn)
            place = _Place(engine, cost, turn, self._admission)
            try:
                # Much may have become known while it waited.
                now = None if present is None else await self._deny_list.turn(present)
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
            self._bodies.keep(-request.bytes_in, request.who)
        request.forgotten, request.body = True, b""

    async def _exchange(
        self, request: RequestContext, place: _Place, send: Send, *, last: bool
    ) -> None:
        """To one engine; the room taken there is given back exactly once."""
        engine, present = place.engine, request.present

        def sent() -> None:
            # Kept only where another engine could be given it, and while bodies leave room.
            if last or self._fleet.open < 2 or not self._bodies.roomy:
                self.forget(request)

        def first() -> None:
            # Of several copies the first byte tells only about one.
            if request.prepared.copies == 1:
                place.begin(cleared)

        def cleared() -> None:
            if present is not None:
                self._deny_list.answered(present)

        exchange = Exchange(
            self._upstream,
            engine,
            request,
            send,
            sent,
            lambda: self.forget(request),
            first,
            lambda: self._monitor.doubt(engine),
            self._deny_list,
        )
        request.engine, request.outcome = engine, exchange.outcome
        outcome, left = exchange.outcome, False
        try:
            await exchange.run(request.body, sent_headers(request))
            if not outcome.broken and not outcome.failed:
                cleared()
        except asyncio.CancelledError:
            left = not outcome.broken
            raise
        finally:
            # A connection may break while the engine lives, and goes on with the request.
            unanswered = not outcome.answered and (left or outcome.broken)
            place.leave(LEFT_SECONDS if unanswered or outcome.stuck else 0.0, left=left)
            if outcome.broken or outcome.failed:
                self._monitor.suspect(engine)
                # One that broke off before a byte came is starting again, or about to: where others
                # are up, it would be asked first, having nothing, and break off every request.
                unbegun = outcome.broken and not outcome.started and not outcome.stuck
                if outcome.vanished or (unbegun and self._fleet.open > engine.up):
                    self._monitor.doubt(engine)
                self._metrics.count("engine_failures_total", f"engine={engine.index}")


class _Place:
    """A place at an engine, and a suspect's turn there.

    Args:
        engine: where.
        cost: what was taken there.
        turn: of a suspect.
        admission: takes both back.
    """

    __slots__ = ("_admission", "_cost", "_left", "_turn", "engine")

    def __init__(
        self, engine: RoutedEngine, cost: Cost, turn: Turn | None, admission: Admission
    ) -> None:
        self.engine, self._cost, self._turn, self._admission = engine, cost, turn, admission
        self._left = False

    def begin(self, cleared: Callable[[], None]) -> None:
        """The answer has begun: give back what it holds no more; a turn ends well, now or later."""
        if not self._left:
            self._left = self._admission.begin(self.engine, self._cost)
        if self._turn is not None and self._turn.longer:
            asyncio.get_running_loop().call_later(_LONGER, self._end_turn_well, cleared)
        else:
            self._end_turn_well(cleared)

    def _end_turn_well(self, cleared: Callable[[], None]) -> None:
        if self._turn is not None and self.engine.turn_of is self._turn:
            cleared()
            self._admission.end_turn(self.engine, self._turn)

    def leave(self, after: float = 0.0, *, left: bool = False) -> None:
        """Give everything back, once.

        Args:
            after: seconds for which the engine may still hold something.
            left: the client left, and the engine may yet die of its request.
        """
        if not self._left:
            self._left = True
            self._admission.release(self.engine, self._cost, after)
        if self._turn is None:
            return
        if left and after:
            loop = asyncio.get_running_loop()
            loop.call_later(_ALONE_AFTER, self._admission.open_turn, self._turn)
            loop.call_later(after, self._admission.end_turn, self.engine, self._turn)
        else:
            self._admission.end_turn(self.engine, self._turn)


async def _until_others_have_begun(engine: RoutedEngine) -> None:
    """Wait until each request that an engine has answers: it gets no others meanwhile."""
    until = time.monotonic() + _LONGEST_WAIT
    while time.monotonic() < until and any(not one.begun for one in engine.in_flight):
        await asyncio.sleep(_LOOK)
