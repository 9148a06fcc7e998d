"""Drives a load: the warm-up, the window that is measured, and the end.

The load goes on until all requests that began in the window are answered, so that the last of them
also meet a busy server. Requests that begin after the window do not count, and are broken off at
the end.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Final

from turbofit.core.process.progress import Step
from turbofit.core.units import doubled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from turbofit.measure.load.client import Answer
    from turbofit.measure.load.spec import LoadSpec

#: Seconds from a failed request to the next in its place; each further failure doubles them.
_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
#: The number of failures in a row (per place, in a closed loop) that ends a load.
_HOPELESS: Final = 4
_LEAST_HOPELESS: Final = 8


class LoadRun:
    """One load from its beginning to its end.

    ``ask`` sends one request, and raises nothing; ``tick`` is called each second.
    """

    def __init__(
        self,
        spec: LoadSpec,
        ask: Callable[[], Awaitable[Answer]],
        tick: Callable[[LoadRun], None] = lambda _: None,
    ) -> None:
        self.spec, self._ask, self._tick = spec, ask, tick
        #: All requests that have ended, in the order of their ends.
        self.answers: list[Answer] = []
        self.opened = time.perf_counter()
        self.closed: float | None = None
        #: Why the load ended early; empty if it did not.
        self.stopped = ""
        #: The largest delay of an arrival, in seconds.
        self.late = 0.0
        self._open, self._left = False, 0
        self._begun = self._failures = 0
        self._end = asyncio.Event()
        self._tasks: set[asyncio.Future[object]] = set()

    def stop(self, why: str = "interrupted") -> None:
        """End the load immediately; what was measured so far counts."""
        self._close()
        self.stopped = self.stopped or why
        self._end.set()

    async def run(self) -> None:
        self.opened = time.perf_counter()
        self._open_if_warm()
        self._spawn(self._heartbeat())
        for _ in range(self.spec.at_once or 0):
            self._spawn(self._place())
        if self.spec.rate is not None:
            self._spawn(self._arrivals(self.spec.rate))
        try:
            await self._end.wait()
        finally:
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def in_window(self) -> bool:
        """Whether a request that begins now counts."""
        return self._open and self.closed is None

    def step(self) -> Step:
        good = sum(answer.answered for answer in self.answers)
        counts = f"{good:,} answered, {len(self.answers) - good:,} failed"
        if not self._open:
            done, total = len(self.answers), self.spec.warm_up_requests
            return Step("warm-up of the load", done, total, "requests", counts)
        if self.closed is not None:
            return Step("last answers", detail=counts)
        seconds, requests = self.spec.measured_seconds, self.spec.requests
        if seconds is None and requests is not None:
            return Step("measuring", self._begun - self._left, requests, "requests", counts)
        return Step("measuring", time.perf_counter() - self.opened, seconds or 0.0, "s", counts)

    async def _place(self) -> None:
        """Send one request after another, as one of the places of a closed loop."""
        failures = 0
        while True:
            answer = await self._request()
            failures = failures + 1 if answer.kind else 0
            if failures:
                pause = doubled(_PAUSE, failures - 1, _LONGEST_PAUSE)
                await asyncio.sleep(max(pause, answer.retry_after))

    async def _arrivals(self, rate: float) -> None:
        """Send requests at random times (Poisson), even if earlier requests failed or were late."""
        at = time.perf_counter()
        while True:
            late = time.perf_counter() - at
            self.late = max(self.late, late)
            await asyncio.sleep(max(0.0, -late))
            self._spawn(self._request())
            at += random.expovariate(rate)

    async def _request(self) -> Answer:
        counts = self.in_window
        self._left += counts
        self._begun += counts
        if counts and self._begun == self.spec.requests:
            self._close()
        answer = await self._ask()
        answer.counts = counts
        self.answers.append(answer)
        self._left -= counts
        self._open_if_warm()
        self._failures = self._failures + 1 if answer.kind else 0
        if self._failures >= max(_LEAST_HOPELESS, _HOPELESS * (self.spec.at_once or 1)):
            self.stop(f"{self._failures} requests in a row failed")
        elif self.closed is not None:
            self._close()
        return answer

    def _open_if_warm(self) -> None:
        if not self._open and len(self.answers) >= self.spec.warm_up_requests:
            self._open, self.opened = True, time.perf_counter()

    def _close(self) -> None:
        """Close the window, and end the load once all requests that count are answered.

        The window is empty if the load never got warm.
        """
        if self.closed is None:
            self.closed = time.perf_counter()
            self.opened = self.opened if self._open else self.closed
        if not self._left:
            self._end.set()

    async def _heartbeat(self) -> None:
        """Close the window in time, and call ``tick`` each second."""
        seconds, ticked = self.spec.measured_seconds, 0.0
        while True:
            now, ends = time.perf_counter(), 1.0
            if self.in_window and seconds is not None:
                ends = self.opened + seconds - now
                if ends <= 0:
                    self._close()
            if now >= ticked + 1.0:
                ticked = now
                self._tick(self)
            await asyncio.sleep(min(max(ends, 0.001), 0.2))

    def _spawn(self, work: Awaitable[object]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
