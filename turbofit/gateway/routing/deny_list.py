"""Finds the requests that end engines, and refuses them.

An engine may end, or may be given up because it answers nobody. Then each of its requests without
the beginning of an answer is *suspected* for an hour. A request whose client left less than ten
seconds before the end is suspected, too.

A suspected request that comes again takes a *turn*: `admission` sends few suspects at a time to an
engine, and equal suspects to only one engine at a time. Other requests may run beside suspects. An
answer clears the suspect. If the engine ends again, another request may be the cause. So in its
next turn the suspect is *alone*: the engine gets no new request before the suspect's answer begins.
If engines end in two turns of a request, the request is refused for an hour.

Of n suspects of one end, the square root of n are at an engine together. So about √n rounds clear
all suspects. If one suspect is the cause, about √n suspects have to be alone afterwards. With more
suspects at a time more of them would have to be alone; with fewer suspects, more rounds follow.

Equal requests end three engines before they are refused, apart from copies that were sent before
the first end. An end with another cause (the process was killed, a GPU is lost, other processes
took its memory) accuses no request: `DenyList.engine_ended` clears the noted suspects.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections import deque
from collections.abc import Callable
from math import ceil, sqrt
from typing import Final

from turbofit.core.process.interpreter import in_thread
from turbofit.core.process.log import LazyLogger
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.routing.engines import EngineDeath, Present, RoutedEngine, Turn

_LOG: Final = LazyLogger(__name__)

#: Seconds for which a request is suspected or refused, from the last end of an engine with it.
_HOUR: Final = 3600.0
#: A request is refused after this number of ends in its own turns.
_REFUSED: Final = 2
_MOST_DEATHS: Final = 256
#: Bytes above which a body is hashed in a thread.
_INLINE: Final = 64 << 10


class DenyList:
    """The suspected and the refused requests; a deny list belongs to one event loop at a time."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        #: The noted deaths of engines; the newest death is last.
        self._deaths: deque[EngineDeath] = deque(maxlen=_MOST_DEATHS)
        #: Adds to a counter of the current gateway's metrics page.
        self.count: Callable[..., None] = lambda *_: None

    async def fingerprint(self, path: str, body: bytes) -> str:
        """Return 24 hexadecimal digits that identify a request and reveal nothing of its text."""

        def hashed() -> str:
            digest = hmac.new(self._key, path.encode() + b"\n", "sha256")
            digest.update(body)
            return digest.hexdigest()[:24]

        return hashed() if len(body) <= _INLINE else await in_thread(hashed)

    def turn(self, request: Present) -> Turn | None:
        """Return the turn that a suspected request must take; None if it is not suspected.

        Raises:
            Refusal: engines ended in two turns of this request (422).
        """
        name = request.fingerprint
        ended_at, in_turn = self._ends(name) if name is not None else ([], 0)
        if in_turn >= _REFUSED:
            minutes = max(1, round((ended_at[0] + _HOUR - time.monotonic()) / 60))
            raise Refusal("convicted", deaths=len(ended_at), minutes=minutes)
        if name is None or not ended_at:
            return None
        newest = next(death for death in reversed(self._deaths) if name in death.accused)
        return Turn(name, together=1 if in_turn else newest.together, alone=in_turn > 0)

    def _ends(self, name: str) -> tuple[list[float], int]:
        """Return the times when engines ended with a request, and how many ended in its turns.

        ``name`` is the request's fingerprint. The newest time is first, by `time.monotonic`. An end
        counts for an hour; each later end with the same request renews the hour.
        """
        ended_at: list[float] = []
        in_turn, since = 0, time.monotonic() - _HOUR
        for death in reversed(self._deaths):
            if name in death.accused and death.at > since:
                ended_at.append(death.at)
                in_turn += name in death.in_turn
                since = death.at - _HOUR
        return ended_at, in_turn

    def answered(self, request: Present) -> None:
        """Clear a request of suspicion, since its answer has begun."""
        for death in self._deaths:
            death.accused.discard(request.fingerprint)

    def engine_died(self, engine: RoutedEngine, sent_at: float = float("-inf")) -> None:
        """Accuse the requests of an engine that broke off an answer, or that was given up.

        ``sent_at`` is the time when the broken-off request was sent.
        """
        death = engine.note_death(sent_at)
        requests = [*engine.in_flight, *engine.left_lately()]
        requests = [present for present in requests if present.fingerprint is not None]
        if not requests or death.noted:
            return
        death.noted, death.in_turn = True, engine.in_turn
        # Those whose answers had not begun may have caused the death.
        death.accused = {
            present.fingerprint
            for present in requests
            if present.fingerprint is not None and not present.begun
        }
        death.together = ceil(sqrt(len(death.accused)))
        self._deaths.append(death)
        for name in death.in_turn & death.accused:
            if self._ends(name)[1] == _REFUSED:
                self.count("convicted_total")
                _LOG.info("request %s is refused: engines ended in its turns", name)
        engine.left.clear()
        self.count("engine_deaths_total", f"engine={engine.index}")

    def nothing_listens(self, engine: RoutedEngine) -> None:
        """Note that nothing listens at an engine's address; accuse requests whose clients left.

        Requests that are still at the engine are noted when their connections break.
        """
        left = [present.sent_at for present in engine.left_lately()]
        if left:
            self.engine_died(engine, max(left))

    def engine_ended(self, engine: RoutedEngine, *, other_cause: bool) -> None:
        """Note that a supervisor saw the end of the engine's process.

        ``other_cause``: accuse no request.
        """
        death = engine.note_end()
        if not other_cause:
            self.engine_died(engine)
            return
        # Requests whose clients have left must not be accused of the next process's death.
        engine.left.clear()
        engine.failed_at = float("inf")
        death.noted = True
        death.accused.clear()

    @property
    def numbers(self) -> tuple[int, int]:
        """The number of suspected requests, and the number of refused requests."""
        names = {name for death in self._deaths for name in death.accused}
        in_turn = [turns for ended_at, turns in map(self._ends, names) if ended_at]
        refused = sum(turns >= _REFUSED for turns in in_turn)
        return len(in_turn) - refused, refused
