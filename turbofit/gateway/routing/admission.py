"""Who goes to which engine, and who waits.

Each engine holds so much at once: units of the vision tower and tokens of the cache where the plan
paid for fewer units than could meet in a forward (`Gate`), and host memory for decoded images
always. What does not fit waits in turn: one queue a client, served in a circle, so that nobody
starves behind somebody else's hundred requests. The first in line is never overtaken by others of
the queue. Where the queue is full, the newest request of the client that has most of it makes room
for a client that has fewer: nobody is kept out by somebody else's requests.

Requests without images do not queue for those with images: they pass where they fit, unless another
one without images waits. The tokens that they reserve hold up nobody for good: an image request at
the head of the line fits, however many tokens are reserved, once those before it have ended.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from itertools import islice
from typing import TYPE_CHECKING, Final

from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.routing.engines import least_busy
from turbofit.gateway.routing.fleet import Fleet
from turbofit.gateway.routing.impossible import impossible

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from turbofit.gateway.limits.cost import Cost
    from turbofit.gateway.routing.engines import Chooser, RoutedEngine

__all__ = ["Admission", "dead"]

#: Ends the name of the line of a client's requests that an engine failed; no client's own name.
_AGAIN: Final = "\n"
#: Stands between a client's name and a number in the name of a line of one request, which waits
#: although an engine has room.
_APART: Final = "\n\n"


class _Waiter:
    """A request in a line, which has a name."""

    __slots__ = ("avoid", "choose", "client", "cost", "future", "line")

    def __init__(
        self, client: str, cost: Cost, choose: Chooser | None, avoid: Collection[RoutedEngine]
    ) -> None:
        self.client, self.line = client, client + _AGAIN if avoid else client
        self.cost, self.choose, self.avoid = cost, choose, avoid
        self.future: asyncio.Future[RoutedEngine] = asyncio.get_running_loop().create_future()


class Admission:
    """Lets requests through to engines.

    Args:
        engines: all of them, each with its own gate and host limit.
        longest: how many may wait.
        seconds: how long one may wait.
    """

    def __init__(
        self, engines: Fleet | Sequence[RoutedEngine], *, longest: int = 256, seconds: float = 30.0
    ) -> None:
        self._fleet = engines if isinstance(engines, Fleet) else Fleet(engines)
        self._longest, self._seconds = longest, seconds
        self._lines: OrderedDict[str, deque[_Waiter]] = OrderedDict()
        #: Those who wait for the first time, by client, the newest last.
        self._places: dict[str, dict[_Waiter, None]] = {}
        self.waiting = self._apart = 0
        #: Those of them that have no images.
        self._light = 0
        # As long as the fleet has this version, only these engines may have room for so much.
        self._full: Cost | None = None
        self._freed: dict[RoutedEngine, None] = {}
        self._version = -1

    async def admit(
        self,
        client: str,
        cost: Cost,
        choose: Chooser | None = None,
        avoid: Collection[RoutedEngine] = (),
    ) -> RoutedEngine:
        """Wait for a place, and take it.

        Args:
            client: whose turn it is.
            cost: what it will hold, its own object; give it back with `begin` and `release`.
            choose: prefers another engine that has room to the least busy one, or none yet.
            avoid: engines that had this request already. It was let in once: it goes to the head
                of the line, however long that is.

        Raises:
            Refusal: 503 where no engine is up, 429 where the line is too long or the wait was, 400
                for what no engine could ever hold.
        """
        if not self._fleet.others(avoid):
            raise dead(self._fleet)
        refusal = impossible(self._fleet.sizes, cost)
        if refusal is not None:
            raise refusal
        if not self._lines or self._passes(cost):
            engine = self._chosen(self._best(cost, avoid), cost, choose, avoid)
            if engine is not None:
                return self.take(engine, cost)
        if self.waiting >= self._longest and not avoid and not self._makes_room(client):
            raise self._busy(f"{self.waiting} requests wait already")
        while True:
            engine = await self._wait(client, cost, choose, avoid)
            if engine.takes and engine.fleet is self._fleet:
                return engine
            # It went out, or began to drain, before this task had its turn.
            self.release(engine, cost)

    def begin(self, engine: RoutedEngine, cost: Cost) -> bool:
        """Give back what an answer that has begun holds no more, and let the next in.

        Returns:
            Whether that was all: where not, `release` gives the rest back.
        """
        gate = engine.gate
        if gate is None or not gate.begin(cost):
            self.release(engine, cost)
            return True
        engine.units = gate.counted
        engine.host_bytes -= cost.host_bytes
        self._given_back(engine)
        return False

    def release(self, engine: RoutedEngine, cost: Cost, after: float = 0.0) -> None:
        """Give back what `admit` took, and let the next in.

        Args:
            engine: where it was.
            cost: what it took.
            after: seconds for which an engine with a gate may still have the request, of whose
                answer nothing came.
        """
        engine.places -= 1
        gate, begun = engine.gate, False
        if gate is None:
            engine.units -= cost.units
        elif after:
            asyncio.get_running_loop().call_later(after, self._forget, engine, cost)
        else:
            begun = gate.end(cost)
            engine.units = gate.counted
        if not begun:
            engine.host_bytes -= cost.host_bytes
        self._given_back(engine)

    def pump(self) -> None:
        """Let in whoever has room now; call it too when an engine has come back or gone."""
        passed = 0
        while len(self._lines) > passed:
            client, line = next(islice(self._lines.items(), passed, None))
            waiter = line[0]
            if waiter.future.done():
                self._drop(waiter)
                continue
            refusal = self._hopeless(waiter)
            if refusal is not None:
                waiter.future.set_exception(refusal)
                self._drop(waiter)
                continue
            best = self._best(waiter.cost, waiter.avoid)
            engine = self._chosen(best, waiter.cost, waiter.choose, waiter.avoid)
            if engine is None:
                if best is None and not waiter.avoid:
                    return
                # Others may go where it must not, or not yet: it holds nobody up.
                if best is not None and _APART not in client:
                    self._set_apart(waiter)
                else:
                    passed += 1
                continue
            waiter.future.set_result(self.take(engine, waiter.cost))
            self._drop(waiter)
            if client in self._lines:
                self._lines.move_to_end(client)

    def _forget(self, engine: RoutedEngine, cost: Cost) -> None:
        """The engine has surely dropped a request whose client left."""
        if engine.gate is not None:
            engine.gate.end(cost)
            engine.units = engine.gate.counted
        self._given_back(engine)

    def _given_back(self, engine: RoutedEngine) -> None:
        if self._full is not None and engine.fleet is self._fleet:
            self._freed[engine] = None
        if self._lines:
            self.pump()

    def _passes(self, cost: Cost) -> bool:
        """Whether it need not wait behind those in line."""
        reserves = cost.tokens and self._fleet.gated
        return cost.light and not (reserves and self._light)

    async def _wait(
        self, client: str, cost: Cost, choose: Chooser | None, avoid: Collection[RoutedEngine]
    ) -> RoutedEngine:
        waiter = _Waiter(client, cost, choose, avoid)
        self._append(waiter)
        if avoid:
            self._lines.move_to_end(waiter.line, last=False)
        # Those before it may wait for what it does not need.
        self.pump()
        try:
            # Not wait_for: it may swallow a cancellation that meets the result.
            done, _ = await asyncio.wait((waiter.future,), timeout=self._seconds)
        except asyncio.CancelledError:
            self._leave(waiter)
            raise
        if not done:
            self._leave(waiter)
            raise self._busy(f"no room within {self._seconds:.0f} s")
        return waiter.future.result()

    def _append(self, waiter: _Waiter) -> None:
        self._lines.setdefault(waiter.line, deque()).append(waiter)
        if not waiter.avoid:
            self._places.setdefault(waiter.client, {})[waiter] = None
        self.waiting += 1
        self._light += waiter.cost.light

    def _makes_room(self, client: str) -> bool:
        """Send the newest request of whoever has most of the queue away, if a client has fewer."""
        most = max(self._places.values(), key=len, default={})
        if len(most) <= len(self._places.get(client, ())) + 1:
            return False
        newest = next(reversed(most))
        self._drop(newest)
        if not newest.future.done():
            why = f"{self.waiting + 1} requests wait already, most of them this client's"
            newest.future.set_exception(self._busy(why))
        return True

    def _set_apart(self, waiter: _Waiter) -> None:
        """Into a line of its own, so that its client's others need not wait for it."""
        self._drop(waiter)
        self._apart += 1
        waiter.line += f"{_APART}{self._apart}"
        self._append(waiter)

    def _leave(self, waiter: _Waiter) -> None:
        """Stop waiting; a place that was just given goes back."""
        if waiter.future.done():
            if not waiter.future.cancelled() and waiter.future.exception() is None:
                self.release(waiter.future.result(), waiter.cost)
            return
        waiter.future.cancel()
        self._drop(waiter)
        self.pump()

    def _drop(self, waiter: _Waiter) -> None:
        line = self._lines.get(waiter.line)
        if line is None or waiter not in line:
            return
        line.remove(waiter)
        places = self._places.get(waiter.client, {})
        if places.pop(waiter, waiter) is None and not places:
            del self._places[waiter.client]
        self.waiting -= 1
        self._light -= waiter.cost.light
        if not line:
            del self._lines[waiter.line]

    @staticmethod
    def _chosen(
        best: RoutedEngine | None,
        cost: Cost,
        choose: Chooser | None,
        avoid: Collection[RoutedEngine],
    ) -> RoutedEngine | None:
        if best is None or choose is None:
            return best
        return choose(best, lambda other: other.fits(cost) and other not in avoid)

    def _best(self, cost: Cost, avoid: Collection[RoutedEngine]) -> RoutedEngine | None:
        """The least busy engine with room.

        Where all are full, each request that ends would have the next in line look at every engine:
        what fitted nowhere fits only where something was given back since.
        """
        full = self._full
        if full is not None and self._version != self._fleet.version:
            full = self._full = None
        if full is None or _less(cost, full):
            best = self._fleet.best(cost, avoid)
            if best is None and not avoid:
                self._full, self._version = cost, self._fleet.version
                self._freed.clear()
            return best
        self._freed = {engine: None for engine in self._freed if engine.fits(full)}
        fitting = [one for one in self._freed if one not in avoid and one.fits(cost)]
        return least_busy(fitting) if fitting else None

    def take(self, engine: RoutedEngine, cost: Cost) -> RoutedEngine:
        """Take a place at an engine, whoever else waits; give it back with `release`."""
        engine.places += 1
        engine.host_bytes += cost.host_bytes
        if engine.gate is None:
            engine.units += cost.units
        else:
            engine.gate.take(cost)
            engine.units = engine.gate.counted
        return engine

    def _hopeless(self, waiter: _Waiter) -> Refusal | None:
        """Why it need not wait any longer, since the engines changed."""
        if not self._fleet.others(waiter.avoid):
            return dead(self._fleet)
        return impossible(self._fleet.sizes, waiter.cost)

    def _busy(self, why: str) -> Refusal:
        return Refusal(
            429, "busy", f"the server is busy: {why}", retry_after=max(1, round(self._seconds / 4))
        )


def _less(cost: Cost, full: Cost) -> bool:
    """Whether it may fit where the other does not."""
    return (
        cost.units < full.units
        or cost.host_bytes < full.host_bytes
        or cost.tokens < full.tokens
        or cost.copies < full.copies
    )


def dead(fleet: Fleet) -> Refusal:
    """No engine is up."""
    if fleet.outage is not None:
        return fleet.outage.refusal()
    return Refusal(
        503,
        "engine_unavailable",
        "the inference engine is unavailable",
        retry_after=fleet.retry_seconds,
    )
