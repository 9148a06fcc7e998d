"""Decides which engine a request goes to, and which requests wait.

Each engine has limits of units and tokens (`Gate`), of host memory for decoded images, and of the
time that grammars take at a token (`RoutedEngine.fits_grammar`). Requests that do not fit wait in a
line for each client. The clients take turns, so a client with a hundred requests does not block
other clients. While the first request waits, all later requests wait, too, unless it waits for the
engine of its conversation alone: the others may then go to other engines, but not to this one. If
the queue is full, a client with fewer waiting requests still gets a place: the client with the most
waiting requests loses its newest request.

A request without images and without a dear grammar may pass the queue if it fits, unless another
such request waits. Such requests do not delay the others for ever: when the requests before it have
ended, the first image request fits, however many tokens are reserved.

A waiting request is refused only if nothing moves: no engine has sent a byte for a while, and the
monitor has seen none that works on. In all it waits no longer than clients do.

Suspects (see `deny_list`) have a queue of their own, which delays no other request. An engine has
few suspects at a time, and equal suspects run one after another.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Collection
from contextlib import suppress
from typing import Final

from turbofit.core.messages import counted
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.gate import Cost, Share
from turbofit.gateway.routing.conversations import Conversation
from turbofit.gateway.routing.engines import Fleet, RoutedEngine, Turn

_SUSPECTS: Final = 256
_SUSPECT_RETRY: Final = 10
#: The longest wait, as a multiple of the wait in which nothing moves: 600 s of 30 s. After 600 s
#: OpenAI's SDK gives a request up.
_LONGEST_WAIT: Final = 20
#: Bounds of ``Retry-After`` in seconds, and the let-in requests by whose times it is estimated.
_LEAST_RETRY, _MOST_RETRY, _LET_IN = 1, 60, 32


class Place:
    """The place of a request: first in the queue, later at an engine.

    ``turn`` is the turn that a suspect takes at the engine; None for other requests.
    ``conversation`` is the request's; None if it has none that an engine could keep.
    """

    engine: RoutedEngine
    _share: Share
    #: A future that is done when the place is given or refused.
    given: asyncio.Future[None]
    #: Whether the engine had the conversation before.
    kept = False

    def __init__(
        self,
        admission: Admission,
        client: str,
        cost: Cost,
        turn: Turn | None,
        conversation: Conversation | None = None,
    ) -> None:
        self._admission, self.client, self.cost, self.turn = admission, client, cost, turn
        self.conversation = conversation
        self._host_bytes = 0

    @property
    def alone(self) -> bool:
        return self.turn is not None and self.turn.alone

    def take(self, engine: RoutedEngine) -> None:
        """Take the place at an engine, and the resources of the request there."""
        self._admission.under_way += 1
        self.engine, self._host_bytes = engine, self.cost.host_bytes
        engine.host_bytes += self._host_bytes
        self._share = engine.gate.take(self.cost)
        engine.token_seconds.append(self.cost.token_seconds)
        if self.turn is not None:
            engine.turns[self] = self.turn

    def begin(self, prompt: int = 0) -> None:
        """Note that the answer begins, and free the request's host memory and units at the engine.

        ``prompt`` are the tokens before the answer, 0 if unknown. Waiting requests that now fit are
        let in.
        """
        self._give_back_host()
        self.engine.gate.begin(self._share, prompt)
        self._end_turn()
        self._admission.pump()

    def leave(self, after: float = 0.0, *, left: bool = False) -> None:
        """Free the resources of the request at the engine, and let waiting requests in.

        The engine may still work on the request for ``after`` seconds. ``left``: the client has
        left, and the request may still end the engine.
        """
        self._give_back_host()
        if self.conversation is not None:
            self._admission.fleet.ended(self.conversation)
        if self.turn is not None:
            self.turn.alone = False  # other requests may come before the turn ends
        loop = asyncio.get_running_loop()
        # What is limited stays taken until the engine has surely dropped the request.
        if after and (self.engine.gate.units is not None or self.cost.token_seconds):
            loop.call_later(after, self._end)
        else:
            self._end()
        if left and after:
            loop.call_later(after, self._end_turn)
        else:
            self._end_turn()

    def _end_turn(self) -> None:
        """End the suspect's turn, so that the next suspect may come to the engine."""
        if self.engine.turns.pop(self, None) is not None:
            self._admission.pump()

    def _end(self) -> None:
        """Free the units and tokens of the request, and let waiting requests in."""
        self.engine.gate.end(self._share)
        self.engine.token_seconds.remove(self.cost.token_seconds)
        self._admission.under_way -= 1
        self._admission.pump()

    def _give_back_host(self) -> None:
        self.engine.host_bytes -= self._host_bytes
        self._host_bytes = 0


class _Queue:
    """The waiting requests of each client; the client whose turn it is comes first."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.lines: OrderedDict[str, deque[Place]] = OrderedDict()

    @property
    def waiting(self) -> int:
        return sum(map(len, self.lines.values()))

    def drop(self, place: Place) -> None:
        line = self.lines.get(place.client, deque())
        with suppress(ValueError):  # the request may have left already
            line.remove(place)
            if not line:
                del self.lines[place.client]

    def room(self, client: str, busy: Refusal) -> bool:
        """Make room for one more request of a client, and return whether there is room.

        If the queue is full, the newest request of the client with the most waiting requests is
        refused with ``busy``. But if ``client`` itself would then have the most waiting requests,
        there is no room.
        """
        if self.waiting < self.longest:
            return True
        most = max(self.lines.values(), key=len, default=deque())
        if len(most) <= len(self.lines.get(client, ())) + 1:
            return False
        newest = most[-1]
        self.drop(newest)
        if not newest.given.done():
            newest.given.set_exception(busy)
        return True


class Admission:
    """Lets requests through to engines; up to ``longest`` requests wait.

    A waiting request is refused after ``seconds`` in which nothing moves.

    ``at_once`` limits the requests at all engines together, like LMDeploy's
    ``--max-concurrent-requests``.
    """

    def __init__(
        self, fleet: Fleet, *, longest: int = 256, seconds: float = 30.0, at_once: int | None = None
    ) -> None:
        self.fleet, self._seconds, self._at_once = fleet, seconds, at_once
        self.under_way = 0
        #: When requests of the queue were let in lately.
        self._let_in: deque[float] = deque(maxlen=_LET_IN)
        self._queue, self._suspects = _Queue(longest), _Queue(_SUSPECTS)

    @property
    def waiting(self) -> int:
        return self._queue.waiting + self._suspects.waiting

    @property
    def waits_for(self) -> str:
        """A sentence about the requests in the queue, and what they wait for; empty if none waits.

        What the first request waits for is said of all.
        """
        count = self._queue.waiting
        if not count:
            return ""
        first = next(iter(self._queue.lines.values()))[0]
        if self._at_once is not None and self.under_way >= self._at_once:
            lacks = "one of the requests at once that the server may have"
        else:
            lacks = self.fleet.lacks(first.cost, first.conversation)
        return f"{counted(count, 'request')} {'wait' if count > 1 else 'waits'} for {lacks}"

    async def admit(
        self,
        client: str,
        cost: Cost,
        turn: Turn | None = None,
        conversation: Conversation | None = None,
    ) -> Place:
        """Wait until the request gets a place at an engine, and return the place.

        Raises:
            Refusal: 503 if no engine is up, 429 if the queue or the wait is too long (503 for
              suspects).
        """
        place = Place(self, client, cost, turn, conversation)
        if not self.fleet.open:
            raise self.fleet.dead()
        first = not self._queue.lines or self._passes(cost)
        if turn is None and first and self._take(place):
            return place
        queue = self._queue if turn is None else self._suspects
        full = self._busy(place, "the queue is full")
        if not queue.room(client, full):
            raise full
        while True:
            await self._wait(queue, place)
            if place.engine.up:
                return place
            place.leave()  # the engine failed, or began to drain, before this task went on

    def pump(self) -> None:
        """Let in all waiting requests for which an engine now has room."""
        while self._let_next_in():
            pass
        while self._let_suspects_in():
            pass

    def _let_next_in(self) -> bool:
        """Let the next waiting request in; return whether any request has left the queue.

        All wait behind the first one; but those behind one that waits for the engine of its
        conversation may go to other engines.
        """
        awaited: set[RoutedEngine] = set()
        for line in self._queue.lines.values():
            for place in line:
                keeper = self.fleet.keeper(place.cost, place.conversation)
                if keeper in awaited and not place.given.done():
                    continue
                if self._settle(self._queue, place, awaited):
                    return True
                if keeper is None:
                    return False
                awaited.add(keeper)
                if len(awaited) == self.fleet.open:
                    return False
        return False

    def _let_suspects_in(self) -> bool:
        """Let in one waiting suspect of each client; return whether any of them left the queue.

        Suspects that must be alone come first, since others would keep the engines from them.
        """
        lines, went = self._suspects.lines, False
        up = [engine for engine in self.fleet.engines if engine.up]
        if up and not any(engine.turn_left for engine in up):  # no engine takes another suspect
            return False
        lone = [place for line in lines.values() for place in line if place.alone]
        for line in tuple(lines.values()):
            next_ones = [place for place in line if place.alone or not lone]
            if any(self._settle(self._suspects, place) for place in next_ones):
                went = True
        return went

    def _settle(self, queue: _Queue, place: Place, awaited: Collection[RoutedEngine] = ()) -> bool:
        """Give a waiting request a place at an engine, or a refusal, if possible.

        Return whether the request has left the queue. Requests before it wait for the ``awaited``
        engines.
        """
        if not place.given.done():
            if not self.fleet.open:
                place.given.set_exception(self.fleet.dead())
            elif self._take(place, awaited):
                place.given.set_result(None)
                self._let_in.append(time.monotonic())
            else:
                return False
        was_first = queue.lines[place.client][0] is place
        queue.drop(place)
        # The other clients come before the rest of its requests. But a client keeps its place for
        # a request that waits for the engine of its conversation.
        if was_first and place.client in queue.lines:
            queue.lines.move_to_end(place.client)
        return True

    def _passes(self, cost: Cost) -> bool:
        """Return whether a request with this cost may pass the requests in the queue."""
        if not cost.light:
            return False
        line = (place for waiting in self._queue.lines.values() for place in waiting)
        return not (cost.tokens and self.fleet.gated and any(place.cost.light for place in line))

    async def _wait(self, queue: _Queue, place: Place) -> None:
        """Wait in a queue until the place is given; raise a `Refusal` if the wait is too long."""
        place.given = asyncio.get_running_loop().create_future()
        queue.lines.setdefault(place.client, deque()).append(place)
        # The new request may fit now: the requests of its queue may wait for other resources.
        self.pump()
        began = time.monotonic()
        latest = began + _LONGEST_WAIT * self._seconds
        try:
            while not place.given.done():
                # What the engines do for others does not help a suspect, which waits for its turn.
                moved_at = began if place.turn is not None else max(began, self.fleet.moved_at)
                now, patience = time.monotonic(), moved_at + self._seconds
                if now >= latest:
                    raise self._busy(place, f"the request has waited for {now - began:.0f} s")
                if now >= patience:
                    raise self._busy(place, f"nothing has moved for {self._seconds:.0f} s")
                # `wait_for` may swallow a cancellation that comes together with the result.
                await asyncio.wait((place.given,), timeout=min(patience, latest) - now)
        except BaseException:  # the wait was too long, or was cancelled
            self._stop_waiting(queue, place)
            raise
        place.given.result()

    def _stop_waiting(self, queue: _Queue, place: Place) -> None:
        """Take a request out of the queue, and free its place if it has just got a place."""
        if place.given.done():
            if place.given.exception() is None:
                place.leave()
        else:
            place.given.cancel()
            queue.drop(place)
            self.pump()

    def _take(self, place: Place, awaited: Collection[RoutedEngine] = ()) -> bool:
        """Give a request a place at the best engine; return False if no engine has room."""
        if self._at_once is not None and self.under_way >= self._at_once:
            return False
        turn = place.turn
        if turn is not None and any(
            turn.fingerprint in each.in_turn for each in self.fleet.engines
        ):
            return False
        best = self.fleet.best(place.cost, turn, place.conversation, awaited)
        if best is None:
            return False
        place.take(best)
        if place.conversation is not None:
            place.kept = self.fleet.note(place.conversation, best)
        return True

    def _busy(self, place: Place, why: str) -> Refusal:
        """Return the refusal of a request that finds no place; ``why`` ends its sentence."""
        if place.turn is not None:
            return Refusal("suspect_waits", why=why, retry_after=_SUSPECT_RETRY)
        why = ": ".join(filter(None, (why, self.waits_for)))
        return Refusal("busy:engines", why=why, retry_after=self._retry_after())

    def _retry_after(self) -> int:
        """Return the seconds after which the queue will have moved on, by its pace until now."""
        let_in, seconds = self._let_in, self._seconds / 4
        if len(let_in) > 1:
            seconds = self._queue.waiting * (time.monotonic() - let_in[0]) / len(let_in)
        return min(max(_LEAST_RETRY, round(seconds)), _MOST_RETRY)
