"""Drives a load: warm-up, the window that is measured, and the end.

The load continues until all requests that began in the window are answered, so that none of them
meets a server that is less busy. Requests that begin after the window do not count and are broken
off at the end.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Final

from turbofit.core.process.progress import Step
from turbofit.core.units import doubled
from turbofit.load.spec import LoadRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from turbofit.load.client import Answer
    from turbofit.load.spec import LoadSpec

#: Seconds from a failure to the next request in its place: doubled by each further failure.
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
        ask: Callable[[LoadRequest], Awaitable[Answer]],
        tick: Callable[[LoadRun], None] = lambda _: None,
    ) -> None:
        self.spec, self._ask, self._tick = spec, ask, tick
        self._requests = requests_of(spec)
        #: All requests that have ended, in the order of their ends.
        self.answers: list[Answer] = []
        self.began = self.opened = time.perf_counter()
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
        """End the load immediately; the measurements so far count."""
        self._close()
        self.stopped = self.stopped or why
        self._end.set()

    async def run(self) -> None:
        self.began = self.opened = time.perf_counter()
        self._open_if_warm()
        self._spawn(self._heartbeat())
        for _ in range(self.spec.at_once or 0):
            self._spawn(self._place())
        if self.spec.at_once is None:
            self._spawn(self._arrivals())
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
        """Run one place of a closed loop: one request after another."""
        failures = 0
        for request in self._requests:
            answer = await self._request(request)
            failures = failures + 1 if answer.kind else 0
            if failures:
                pause = doubled(_PAUSE, failures - 1, _LONGEST_PAUSE)
                await asyncio.sleep(max(pause, answer.retry_after))

    async def _arrivals(self) -> None:
        """Send requests at their times, even if earlier ones failed; late ones are sent, too."""
        begun = time.perf_counter()
        for request in self._requests:
            wait = begun + request.at - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            else:
                self.late = max(self.late, -wait)
                await asyncio.sleep(0)
            self._spawn(self._request(request))

    async def _request(self, request: LoadRequest) -> Answer:
        counts = self.in_window
        self._left += counts
        self._begun += counts
        if counts and self._begun == self.spec.requests:
            self._close()
        answer = await self._ask(request)
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
        """End the window, which is empty if the load never got warm, and then the load."""
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


def requests_of(spec: LoadSpec) -> Iterator[LoadRequest]:
    """Random requests without end; in an open loop with times."""
    # Pauses have their own random numbers, so that another rate sends the same requests.
    draw, pauses, at = random.Random(spec.seed), random.Random(f"{spec.seed} arrivals"), 0.0
    while True:
        yield LoadRequest(
            at=at,
            prompt_tokens=_about(draw, spec.prompt_tokens, spec.prompt_spread),
            output_tokens=_about(draw, spec.output_tokens, spec.output_spread),
            images=tuple(draw.choice(spec.image_size) for _ in range(spec.images)),
        )
        if spec.rate is not None:
            at += 1 / spec.rate if spec.evenly else pauses.expovariate(spec.rate)


def _about(draw: random.Random, mean: int, spread: float) -> int:
    """A random whole number, evenly distributed within the spread around the mean."""
    half = int(mean * spread)
    return max(1, mean + draw.randint(-half, half))
