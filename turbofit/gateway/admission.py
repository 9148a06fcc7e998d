"""Who goes to which engine, and who waits.

Each engine holds so much at once: units of the vision tower where the plan paid for fewer than
could meet in a forward, and host memory for decoded images always. What does not fit waits in turn:
one queue a client, served in a circle, so that nobody starves behind somebody else's hundred
requests. The first in line is never overtaken by smaller ones of the queue; requests that cost
nothing do not queue.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Final

from turbofit.core.struct import Struct
from turbofit.gateway.refusals import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.gateway.engines import Engine

__all__ = ["Admission", "Cost", "dead"]

_RETRY_DEAD: Final = 5


class Cost(Struct):
    """What a request holds of an engine until it lets go."""

    units: int = 0
    host_bytes: int = 0

    @property
    def free(self) -> bool:
        """Whether it holds nothing."""
        return not self.units and not self.host_bytes


class _Waiter:
    """A request in line."""

    __slots__ = ("choose", "cost", "future")

    def __init__(self, cost: Cost, choose: Chooser, future: asyncio.Future[Engine]) -> None:
        self.cost, self.choose, self.future = cost, choose, future


if TYPE_CHECKING:
    Chooser = Callable[[Sequence[Engine]], Engine]


class Admission:
    """Lets requests through to engines.

    Args:
        engines: all of them.
        gate: units in flight to one engine, None for any number.
        host_bytes: host memory of decoded images in flight to one engine.
        longest: how many may wait.
        seconds: how long one may wait.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        gate: int | None,
        host_bytes: int,
        longest: int = 256,
        seconds: float = 30.0,
    ) -> None:
        self._engines, self._gate, self._host_bytes = tuple(engines), gate, host_bytes
        self._longest, self._seconds = longest, seconds
        self._lines: OrderedDict[str, deque[_Waiter]] = OrderedDict()
        self.waiting = 0

    async def admit(self, client: str, cost: Cost, choose: Chooser) -> Engine:
        """Wait for a place, and take it.

        Args:
            client: whose turn it is.
            cost: what it will hold; give it back with `release`.
            choose: the best of several engines that have room.

        Raises:
            Refusal: 503 where no engine is up, 429 where the line is too long or the wait was, 400
                for what no engine could ever hold.
        """
        self._refuse_impossible(cost)
        if cost.free or not self._lines:
            room = self._with_room(cost)
            if room:
                return self._take(choose(room), cost)
        if not any(engine.up for engine in self._engines):
            raise dead()
        if self.waiting >= self._longest:
            raise self._busy(f"{self.waiting} requests wait already")
        return await self._wait(client, cost, choose)

    def release(self, engine: Engine, cost: Cost) -> None:
        """Give back what `admit` took, and let the next in."""
        engine.units -= cost.units
        engine.host_bytes -= cost.host_bytes
        if self._lines:
            self.pump()

    def pump(self) -> None:
        """Let in whoever has room now; call it too when an engine has come back or gone."""
        while self._lines:
            client, line = next(iter(self._lines.items()))
            waiter = line[0]
            if waiter.future.done():
                self._drop(client, waiter)
                continue
            if not any(engine.up for engine in self._engines):
                waiter.future.set_exception(dead())
                self._drop(client, waiter)
                continue
            room = self._with_room(waiter.cost)
            if not room:
                return
            waiter.future.set_result(self._take(waiter.choose(room), waiter.cost))
            self._drop(client, waiter)
            if client in self._lines:
                self._lines.move_to_end(client)

    async def _wait(self, client: str, cost: Cost, choose: Chooser) -> Engine:
        waiter = _Waiter(cost, choose, asyncio.get_running_loop().create_future())
        self._lines.setdefault(client, deque()).append(waiter)
        self.waiting += 1
        try:
            # Not wait_for: it may swallow a cancellation that meets the result.
            done, _ = await asyncio.wait((waiter.future,), timeout=self._seconds)
        except asyncio.CancelledError:
            self._leave(client, waiter)
            raise
        if not done:
            self._leave(client, waiter)
            raise self._busy(f"no room within {self._seconds:.0f} s")
        return waiter.future.result()

    def _leave(self, client: str, waiter: _Waiter) -> None:
        """Stop waiting; a place that was just given goes back."""
        if waiter.future.done():
            if not waiter.future.cancelled() and waiter.future.exception() is None:
                self.release(waiter.future.result(), waiter.cost)
            return
        waiter.future.cancel()
        self._drop(client, waiter)
        self.pump()

    def _drop(self, client: str, waiter: _Waiter) -> None:
        line = self._lines.get(client)
        if line is None or waiter not in line:
            return
        line.remove(waiter)
        self.waiting -= 1
        if not line:
            del self._lines[client]

    def _with_room(self, cost: Cost) -> list[Engine]:
        return [
            engine
            for engine in self._engines
            if engine.up
            and (self._gate is None or engine.units + cost.units <= self._gate)
            and engine.host_bytes + cost.host_bytes <= self._host_bytes
        ]

    def _take(self, engine: Engine, cost: Cost) -> Engine:
        engine.units += cost.units
        engine.host_bytes += cost.host_bytes
        return engine

    def _refuse_impossible(self, cost: Cost) -> None:
        if self._gate is not None and cost.units > self._gate:
            raise Refusal(
                400,
                "units_over_limit",
                f"{cost.units} vision units at once, the limit is {self._gate}",
            )
        if cost.host_bytes > self._host_bytes:
            raise Refusal(
                400,
                "images_over_limit",
                f"images of {cost.host_bytes} bytes once decoded, the limit is {self._host_bytes}",
            )

    def _busy(self, why: str) -> Refusal:
        return Refusal(
            429, "busy", f"the server is busy: {why}", retry_after=max(1, round(self._seconds / 4))
        )


def dead() -> Refusal:
    """No engine is up."""
    return Refusal(
        503, "engine_unavailable", "the inference engine is unavailable", retry_after=_RETRY_DEAD
    )
