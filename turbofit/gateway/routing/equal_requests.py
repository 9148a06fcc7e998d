"""Keeps equal requests on one engine until it has answered one of them.

Of a request that no engine has answered yet nobody knows whether it ends engines, and clients send
one several times at once: a load test, a person who asks again. The first goes where any request
would. For ten seconds the others go to the same engine, or wait where it has no room, so that no
other engine ends. Once an answer is whole, or the engine has had one of them for all that time,
they go to all engines, then and later. Where that engine loses them without a death (nothing
listens there, its machine vanished, it was drained), they go to the next one in the same way. Where
no client stayed for all that time, the next request after it counts as the first.

Over: requests with the same sketch (`fingerprints`) are taken for equal; one that was there for all
the time counts only if it still is when the next equal one comes. Under: an engine that ends later
than ten seconds after it was given the first of them; equal requests at another gateway. What an
engine failed is not kept here: `trials` has the suspects.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.gateway.routing.engines import Chooser, RoutedEngine
    from turbofit.gateway.routing.stuck import InFlight

__all__ = ["EqualRequests"]

#: Seconds for which equal requests go to the engine of the first; less than one waits for room.
_SECONDS: Final = 10.0
#: A request that is sent so many seconds after the first, at most, counts as there all the time.
_SENT_WITHIN: Final = 1.0
#: Seconds by which a timer of the fastest loop, which counts milliseconds, is surely not early.
_EARLY: Final = 0.02
#: Requests that may go to all engines, which are remembered.
_REMEMBERED: Final = 8192


class _First:
    """Where the first of equal requests went, until when the others go there, and if any waits.

    ``sent``: one that the engine has had for all the time, if it still has it.
    """

    __slots__ = ("engine", "sent", "until", "waited_for")

    def __init__(self, engine: RoutedEngine, until: float) -> None:
        self.engine, self.until, self.waited_for = engine, until, False
        self.sent: InFlight | None = None

    @property
    def was_there(self) -> bool:
        """Whether the engine has had one of them for all the time."""
        return self.sent is not None and self.sent in self.engine.in_flight


class EqualRequests:
    """Says where a request may go while an equal one is unanswered.

    Args:
        clock: seconds that only grow.
        pump: lets those in who wait for room and may have it now.
    """

    def __init__(self, clock: Callable[[], float], pump: Callable[[], None]) -> None:
        self._clock, self._pump = clock, pump
        #: By sketch, the oldest first.
        self._unanswered: dict[str, _First] = {}
        #: Sketches of requests that may go to all engines, the newest last.
        self._free: OrderedDict[str, None] = OrderedDict()

    def chooser(self, sketch: str, otherwise: Chooser | None) -> Chooser | None:
        """How to choose an engine for a request.

        Args:
            sketch: of the request.
            otherwise: how, where no equal one is unanswered; None for the least busy engine.
        """
        if sketch in self._free:
            return otherwise

        def choose(best: RoutedEngine, fits: Callable[[RoutedEngine], bool]) -> RoutedEngine | None:
            first = self._first(sketch)
            if first is not None and first.engine.fleet is best.fleet:
                if fits(first.engine):
                    return first.engine
                self._look_again(first)
                return None
            engine = best if otherwise is None else otherwise(best, fits)
            if engine is not None and sketch not in self._free:
                self._unanswered[sketch] = _First(engine, self._clock() + _SECONDS)
            return engine

        return choose

    def sent(self, sketch: str, engine: RoutedEngine, request: InFlight) -> None:
        """An engine is given it now."""
        first = self._unanswered.get(sketch)
        if first is None or first.engine is not engine or first.was_there:
            return
        if self._clock() < first.until - _SECONDS + _SENT_WITHIN:
            first.sent = request

    def answered(self, sketch: str) -> None:
        """An engine has answered it: equal ones may go to all of them."""
        self._remember(sketch)
        self._drop(sketch)

    def lost(self, sketch: str, engine: RoutedEngine) -> None:
        """An engine does not answer it: of the equal ones the next goes where any request would.

        The others go there too, those as well that this engine loses later, with all that it had.
        """
        self._free.pop(sketch, None)
        first = self._unanswered.get(sketch)
        if first is not None and first.engine is engine:
            self._drop(sketch)

    def _drop(self, sketch: str) -> None:
        """Equal ones need not wait for it any longer."""
        first = self._unanswered.pop(sketch, None)
        if first is not None and first.waited_for:
            self._pump()

    def _first(self, sketch: str) -> _First | None:
        """Where the first went, if its time is not over."""
        now = self._clock()
        while self._unanswered:
            oldest = next(iter(self._unanswered))
            if self._unanswered[oldest].until > now:
                break
            if self._unanswered.pop(oldest).was_there:
                self._remember(oldest)
        return self._unanswered.get(sketch)

    def _remember(self, sketch: str) -> None:
        self._free[sketch] = None
        self._free.move_to_end(sketch)
        if len(self._free) > _REMEMBERED:
            self._free.popitem(last=False)

    def _look_again(self, first: _First) -> None:
        """Somebody waits: look again when the time is over, by the clock."""
        if not first.waited_for:
            first.waited_for = True
            seconds = first.until - self._clock() + _EARLY
            asyncio.get_running_loop().call_later(seconds, self._pump)
