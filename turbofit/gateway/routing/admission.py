"""Who goes to which engine, and who waits.

Each engine holds so much at once: units of the vision tower and tokens of the cache where the plan
paid for fewer units than could meet in a forward (`Gate`), and host memory for decoded images
always. What does not fit waits in turn: one line a client, served in a circle, so that nobody
starves behind somebody else's hundred requests. The first in line is never overtaken by others of
the queue. Where the queue is full, the newest request of the client that has most of it makes room
for a client that has fewer: nobody is kept out by somebody else's requests.

Requests without images do not queue for those with images: they pass where they fit, unless another
one without images waits. The tokens that they reserve hold up nobody for good: an image request at
the head of the line fits, however many tokens are reserved, once those before it have ended.

Suspects (`deny_list`) have a queue of their own, which holds up nobody: an engine has one of them
at a time, and each fingerprint, or client, has one turn at a time on all engines.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from turbofit.gateway.http.refusals import Refusal

if TYPE_CHECKING:
    from collections.abc import Collection

    from turbofit.gateway.limits.gate import Cost, EngineCapacity
    from turbofit.gateway.routing.engines import Chooser, Fleet, RoutedEngine
    from turbofit.gateway.routing.suspects import Turn

__all__ = ["Admission"]

_SUSPECTS: Final = 256
_SUSPECT_RETRY: Final = 10


class _Waiter:
    """A request in a queue."""

    def __init__(self, client: str, cost: Cost, choose: Chooser | None, turn: Turn | None) -> None:
        self.client, self.cost, self.choose, self.turn = client, cost, choose, turn
        self.future: asyncio.Future[RoutedEngine] = asyncio.get_running_loop().create_future()


class _Queue:
    """A line for each client; the client whose turn it is comes first."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.lines: OrderedDict[str, deque[_Waiter]] = OrderedDict()

    @property
    def waiting(self) -> int:
        return sum(map(len, self.lines.values()))

    @property
    def light(self) -> bool:
        """Whether any has no images."""
        return any(waiter.cost.light for line in self.lines.values() for waiter in line)

    def append(self, waiter: _Waiter) -> None:
        self.lines.setdefault(waiter.client, deque()).append(waiter)

    def drop(self, waiter: _Waiter) -> None:
        line = self.lines.get(waiter.client, deque())
        with suppress(ValueError):  # it has left already
            line.remove(waiter)
            if not line:
                del self.lines[waiter.client]

    def room(self, client: str, busy: Refusal) -> bool:
        """Whether one more of a client may wait.

        Where the queue is full, the newest request of whoever has most of it is sent away if this
        client has fewer.
        """
        if self.waiting < self.longest:
            return True
        most = max(self.lines.values(), key=len, default=deque())
        if len(most) <= len(self.lines.get(client, ())) + 1:
            return False
        newest = most[-1]
        self.drop(newest)
        if not newest.future.done():
            newest.future.set_exception(busy)
        return True


class Admission:
    """Lets requests through to engines.

    Args:
        fleet: all engines, each with its own gate and host limit.
        longest: how many may wait.
        seconds: how long one may wait.
    """

    def __init__(self, fleet: Fleet, *, longest: int = 256, seconds: float = 30.0) -> None:
        self._fleet, self._seconds = fleet, seconds
        self._queue, self._suspects = _Queue(longest), _Queue(_SUSPECTS)
        #: Names of those who have a turn.
        self._turns: set[str] = set()

    @property
    def waiting(self) -> int:
        """How many wait, suspects or not."""
        return self._queue.waiting + self._suspects.waiting

    async def admit(
        self, client: str, cost: Cost, choose: Chooser | None = None, turn: Turn | None = None
    ) -> RoutedEngine:
        """Wait for a place, and take it.

        Args:
            client: whose turn it is.
            cost: what it will hold, its own object; give it back with `begin` and `release`.
            choose: prefers another engine that has room to the least busy one.
            turn: of a suspect, which is its own until `end_turn`.

        Raises:
            Refusal: 503 where no engine is up, 429 where the line is too long or the wait was, 503
                for suspects, 400 for what no engine could ever hold.
        """
        refusal = self._hopeless(cost)
        if refusal is not None:
            raise refusal
        if turn is None and (not self._queue.lines or self._passes(cost)):
            engine = self._fleet.best(cost)
            if engine is not None:
                return self._take(engine, cost, choose, None)
        queue = self._queue if turn is None else self._suspects
        full = self._busy(turn, f"{queue.waiting} such requests wait already")
        if not queue.room(client, full):
            raise full
        while True:
            engine = await self._wait(queue, _Waiter(client, cost, choose, turn))
            if engine.up:
                return engine
            # It went out, or began to drain, before this task had its turn.
            self.end_turn(engine, turn)
            self.release(engine, cost)

    def begin(self, engine: RoutedEngine, cost: Cost) -> bool:
        """Give back what an answer that has begun holds no more, and let the next in.

        Returns:
            Whether that was all: where not, `release` gives the rest back.
        """
        if not engine.gate.begin(cost):
            self.release(engine, cost)
            return True
        engine.host_bytes -= cost.host_bytes
        self._given_back()
        return False

    def release(self, engine: RoutedEngine, cost: Cost, after: float = 0.0) -> None:
        """Give back what `admit` took, and let the next in.

        Args:
            engine: where it was.
            cost: what it took.
            after: seconds for which an engine with a gate may still have the request, of whose
                answer nothing came.
        """
        begun = False
        if after and engine.gate.units is not None:
            asyncio.get_running_loop().call_later(after, self._forget, engine, cost)
        else:
            begun = engine.gate.end(cost)
        if not begun:
            engine.host_bytes -= cost.host_bytes
        self._given_back()

    def end_turn(self, engine: RoutedEngine, turn: Turn | None) -> None:
        """The next suspect may come to an engine."""
        if turn is not None and engine.turn_of is turn:
            engine.turn_of = None
            self._turns.discard(turn.name)
            self._given_back()

    def open_turn(self, turn: Turn) -> None:
        """Others may come to an engine beside a turn that was alone there."""
        turn.alone = False
        self._given_back()

    def pump(self) -> None:
        """Let in whoever has room now; call it too when an engine has come back or gone."""
        lines = self._queue.lines
        while lines:
            client, line = next(iter(lines.items()))
            if not self._looked_at(self._queue, line[0]):
                break
            if client in lines:
                lines.move_to_end(client)
        full: Cost | None = None
        for waiting in tuple(self._suspects.lines.values()):
            for waiter in tuple(waiting):
                if full is not None and not _less(waiter.cost, full):
                    continue  # no engine has room and a turn for it
                if self._looked_at(self._suspects, waiter):
                    if waiter.client in self._suspects.lines:
                        self._suspects.lines.move_to_end(waiter.client)
                    break
                if waiter.turn is not None and waiter.turn.name not in self._turns:
                    full = waiter.cost

    def _looked_at(self, queue: _Queue, waiter: _Waiter) -> bool:
        """Whether somebody need not wait any longer: for a place, or at all."""
        if not waiter.future.done():
            refusal = self._hopeless(waiter.cost)
            engine = None if refusal is not None else self._best(waiter.cost, waiter.turn)
            if refusal is not None:
                waiter.future.set_exception(refusal)
            elif engine is None:
                return False
            else:
                taken = self._take(engine, waiter.cost, waiter.choose, waiter.turn)
                waiter.future.set_result(taken)
        queue.drop(waiter)
        return True

    def _forget(self, engine: RoutedEngine, cost: Cost) -> None:
        """The engine has surely dropped a request whose client left."""
        engine.gate.end(cost)
        self._given_back()

    def _given_back(self) -> None:
        if self.waiting:
            self.pump()

    def _passes(self, cost: Cost) -> bool:
        """Whether it need not wait behind those in line."""
        reserves = cost.tokens and self._fleet.gated
        return cost.light and not (reserves and self._queue.light)

    async def _wait(self, queue: _Queue, waiter: _Waiter) -> RoutedEngine:
        queue.append(waiter)
        # Those before it may wait for what it does not need.
        self.pump()
        try:
            # Not wait_for: it may swallow a cancellation that meets the result.
            done, _ = await asyncio.wait((waiter.future,), timeout=self._seconds)
        except asyncio.CancelledError:
            self._leave(queue, waiter)
            raise
        if not done:
            self._leave(queue, waiter)
            raise self._busy(waiter.turn, f"no room within {self._seconds:.0f} s")
        return waiter.future.result()

    def _leave(self, queue: _Queue, waiter: _Waiter) -> None:
        """Stop waiting; a place that was just given goes back."""
        if waiter.future.done():
            if not waiter.future.cancelled() and waiter.future.exception() is None:
                engine = waiter.future.result()
                self.end_turn(engine, waiter.turn)
                self.release(engine, waiter.cost)
            return
        waiter.future.cancel()
        queue.drop(waiter)
        self.pump()

    def _best(self, cost: Cost, turn: Turn | None) -> RoutedEngine | None:
        """The least busy engine with room."""
        taken = turn is not None and turn.name in self._turns
        return None if taken else self._fleet.best(cost, turn)

    def _take(
        self, best: RoutedEngine, cost: Cost, choose: Chooser | None, turn: Turn | None
    ) -> RoutedEngine:
        """Take a place at the least busy engine, or at another one that is preferred."""
        engine = best if choose is None else choose(best, lambda one: one.fits(cost, turn))
        if turn is not None:
            engine.turn_of = turn
            self._turns.add(turn.name)
        engine.host_bytes += cost.host_bytes
        engine.gate.take(cost)
        return engine

    def _hopeless(self, cost: Cost) -> Refusal | None:
        """Why it need not wait any longer, as the engines are now."""
        return _impossible(self._fleet.sizes, cost) if self._fleet.open else self._fleet.dead()

    def _busy(self, turn: Turn | None, why: str) -> Refusal:
        if turn is not None:
            return Refusal("suspect_waits", why=why, retry_after=_SUSPECT_RETRY)
        return Refusal("busy:engines", why=why, retry_after=max(1, round(self._seconds / 4)))


def _less(cost: Cost, full: Cost) -> bool:
    """Whether it may fit where the other does not."""
    return (
        cost.units < full.units
        or cost.host_bytes < full.host_bytes
        or cost.tokens < full.tokens
        or cost.copies < full.copies
    )


def _impossible(sizes: Collection[EngineCapacity], cost: Cost) -> Refusal | None:
    """What to say of a request that fits no engine, even an empty one; None where it fits."""
    if any(size.holds(cost) for size in sizes):
        return None
    wide = [size for size in sizes if size.units is None or cost.units <= size.units]
    if not wide:
        widest = max(size.units for size in sizes if size.units is not None)
        return Refusal("units_over_limit", units=cost.units, widest=widest)
    most = max(size.host_bytes for size in wide if size.host_bytes is not None)
    return Refusal("images_over_limit", size=cost.host_bytes, most=most)
