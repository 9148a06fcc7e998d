"""All engines of a gateway, and the least busy of them without looking at each.

A heap of notes: where an engine stood when the note was written. A note that promises less than is
true now would hide its engine, so one is written whenever an engine gets better; a note that
promises too much is corrected when it comes up. The choice is exact at any number of engines.
"""

from __future__ import annotations

import time
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from math import ceil
from typing import TYPE_CHECKING, Final

from turbofit.gateway.routing.engines import least_busy

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from turbofit.gateway.limits.cost import Cost
    from turbofit.gateway.limits.gate import EngineCapacity
    from turbofit.gateway.routing.engines import Entry, RoutedEngine
    from turbofit.gateway.routing.outage import Outage
    from turbofit.gateway.routing.suspects import Turn

__all__ = ["Fleet"]

#: After so many engines without room the rest is looked through in one go.
_SET_ASIDE: Final = 64
_SPARE_NOTES: Final = 256
#: Seconds of `Retry-After` where no start is forecast; and at most: older SDKs obey no more.
_RETRY, _LONGEST_RETRY = 5, 60
#: Seconds from an engine's end to its next start, where that was not seen.
_PAUSE: Final = 2.0


class Fleet:
    """Engines in order; iterate over it for all of them, dead ones too.

    Args:
        engines: those to begin with.
    """

    def __init__(self, engines: Sequence[RoutedEngine] = ()) -> None:
        self._all: tuple[RoutedEngine, ...] = ()
        self._notes: list[Entry] = []
        self._number = count()
        #: Why none will be up for a while, where that is known.
        self.outage: Outage | None = None
        #: How many take requests.
        self.open = 0
        #: Grows whenever there may be more room than what was given back.
        self.version = 0
        #: What they hold at most, each size once.
        self.sizes: frozenset[EngineCapacity] = frozenset()
        #: Whether any has a gate: texts hold something there too.
        self.gated = False
        self.set(engines)

    def __iter__(self) -> Iterator[RoutedEngine]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def engines(self) -> tuple[RoutedEngine, ...]:
        """All of them."""
        return self._all

    def set(self, engines: Sequence[RoutedEngine]) -> None:
        """These and no others from now on; call it too when the limits of one changed."""
        for engine in self._all:
            engine.fleet = engine.entry = None
        self._all = tuple(engines)
        for engine in self._all:
            engine.fleet = self
        self.open = sum(engine.takes for engine in self._all)
        self.sizes = frozenset(one.capacity for one in self._all)
        self.gated = any(one.gate is not None for one in self._all)
        self.version += 1
        self._write_anew()

    def risen(self, engine: RoutedEngine) -> None:
        """An engine stands better than before."""
        rank, entry = engine.rank, engine.entry
        if engine.takes and (entry is None or rank < entry[0]):
            engine.entry = (rank, next(self._number), engine)
            heappush(self._notes, engine.entry)
            if len(self._notes) > 4 * len(self._all) + _SPARE_NOTES:
                self._write_anew()

    def turned(self, engine: RoutedEngine) -> None:
        """An engine takes requests now, or takes none any more."""
        self.open += 1 if engine.takes else -1
        if engine.takes:
            self.version += 1
            self.risen(engine)

    @property
    def retry_seconds(self) -> int:
        """Seconds after which to ask again where none serves: the first engine's next start.

        Under: a start that takes longer than the engine's last one, or than a minute.
        """
        now = time.monotonic()
        starts = [
            one.died_at + one.start_seconds + _PAUSE - now
            for one in self._all
            if one.start_seconds and one.death is not None and not one.answered
        ]
        left = [ceil(seconds) for seconds in starts if seconds > 0]
        return min(*left, _LONGEST_RETRY) if left else _RETRY

    def best(self, cost: Cost, turn: Turn | None = None) -> RoutedEngine | None:
        """The least busy engine that has room for so much, and for a turn; None where none has."""
        aside: list[Entry] = []
        found = None
        while self._notes:
            entry = self._notes[0]
            engine = entry[2]
            if engine.entry is not entry:
                heappop(self._notes)
            elif not engine.takes:
                heappop(self._notes)
                engine.entry = None
            elif engine.rank != entry[0]:
                engine.entry = (engine.rank, next(self._number), engine)
                heapreplace(self._notes, engine.entry)
            elif engine.fits(cost, turn):
                found = engine
                break
            elif len(aside) == _SET_ASIDE:
                fitting = [one for one in self._all if one.fits(cost, turn)]
                found = least_busy(fitting) if fitting else None
                break
            else:
                aside.append(heappop(self._notes))
        for entry in aside:
            heappush(self._notes, entry)
        return found

    def _write_anew(self) -> None:
        for engine in self._all:
            engine.entry = (engine.rank, next(self._number), engine) if engine.takes else None
        self._notes = [engine.entry for engine in self._all if engine.entry is not None]
        heapify(self._notes)
