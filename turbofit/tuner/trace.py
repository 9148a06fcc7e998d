"""Simulates a trace of requests on a plan's engines, event by event, without a GPU.

Between two events (a request arrives or ends, the cache is full) all decoding steps are alike, so
many are computed at once, with the rates of `tuner.speed`. A prefill is a separate forward, for
which all running requests wait. Requests that do not fit wait in the order of arrival. If the cache
is full, the request admitted last loses its tokens (over: all of them) and starts again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush
from math import ceil, inf, isnan, nan, sqrt
from typing import NamedTuple

from turbofit.core.struct import Struct
from turbofit.tuner.speed import GroupRates, rates
from turbofit.tuner.tower import BEFORE


class TraceRequest(NamedTuple):
    """One request, ``at`` seconds after the first; ``prompt`` includes the tokens of images.

    ``units`` are vision units; they and ``image_tokens`` are totals of all images of the request.
    """

    at: float
    prompt: int
    output: int
    units: int = 0
    images: int = 0
    image_tokens: int = 0


class TraceTimes(Struct):
    """The start, first token and end of each request; nan if it did not happen.

    ``refused``: requests that waited too long for their turn in the gateway.
    """

    begun: list[float]
    first: list[float]
    ended: list[float]
    refused: list[int]


class SimulatedEngine(NamedTuple):
    """One engine of a plan.

    Prompts are read together up to ``context`` tokens. ``gate`` limits the vision units of requests
    without a first token, and is None if none queue; ``share`` is the engine's part of all
    requests.
    """

    rates: GroupRates
    batch: int
    kv_tokens: int
    chunk: int
    gate: int | None = None
    share: float = 1.0
    context: float = inf


class EngineLoad:
    """The clock, the batch and the cache of one engine, with the times of their use."""

    def __init__(
        self, engine: SimulatedEngine, requests: Sequence[TraceRequest], times: TraceTimes,
        patience: float,
    ) -> None:  # fmt: skip
        self.engine, self._requests, self._times = engine, requests, times
        self._patience, self._figures = patience, rates()
        self._slope = engine.rates.work.kv_bytes / engine.rates.card.bandwidth
        self._bases: dict[int, float] = {}
        #: Seconds, and decoding steps, since the beginning.
        self.now, self._steps = 0.0, 0
        #: Requests that wait for the engine.
        self.waiting: deque[int] = deque()
        #: Running requests: by the step at which each ends, and in the order of admission.
        self._ends: list[tuple[int, int]] = []
        self._order: list[int] = []
        self._running: dict[int, int] = {}
        self._done: dict[int, int] = {}
        self._fresh: list[int] = []
        self._cached = 0
        #: Vision units, and tokens of prompts, since the last decoding step.
        self._prefill_units = self._prefill_tokens = 0
        #: When LMDeploy's event loop has taken the last request, and each; it takes one at a time.
        self._loop = 0.0
        self._ready: dict[int, float] = {}
        self.busy = self.running_seconds = self.cached_seconds = 0.0
        self.evicted = self.most_waiting = self.most_cached = 0

    @property
    def outstanding(self) -> int:
        return len(self.waiting) + len(self._running)

    def take(self, index: int) -> None:
        at = self._requests[index].at
        self._ready[index] = max(self._loop, at)
        self._loop = self._ready[index] + self._figures.request_seconds
        if not self._running and not self.waiting:
            self.now = max(self.now, at)
        self.waiting.append(index)
        if self.now > at:
            self.most_waiting = max(self.most_waiting, len(self.waiting))

    def advance(self, until: float) -> None:
        """Simulate whole steps up to a time."""
        while self.now < until and (self.waiting or self._running):
            self._admit()
            if self._running and self.now < until:
                self._decode(until)

    def _admit(self) -> None:
        """Prefill the waiting requests that fit, as many as share a forward."""
        engine = self.engine
        while (
            self.waiting
            and len(self._running) < engine.batch
            and self._prefill_tokens < engine.chunk
        ):
            index = self.waiting[0]
            request, count = self._requests[index], len(self._running)
            tokens = request.prompt + self._done.get(index, 0)
            if not count:
                self.now = max(self.now, self._ready[index])
            if self._has_waited_too_long(index):
                self._times.refused.append(self.waiting.popleft())
                continue
            met = self._prefill_units + request.units
            if count and (self._ready[index] > self.now or self._must_wait(tokens, met)):
                return
            self.waiting.popleft()
            self._prefill(index, request, tokens)
            self._prefill_units, self._prefill_tokens = met, self._prefill_tokens + tokens

    def _has_waited_too_long(self, index: int) -> bool:
        """Whether the gateway refuses an image request whose turn has not come."""
        request = self._requests[index]
        if self.engine.gate is None or not request.units:
            return False
        return isnan(self._times.begun[index]) and self.now - request.at > self._patience

    def _must_wait(self, tokens: int, met: int) -> bool:
        """Whether a prompt must wait, because of the cache, the context or its images.

        ``met`` are the vision units in the forward with it.
        """
        engine = self.engine
        if engine.gate is not None and self._prefill_units and met > engine.gate:
            return True
        if self._prefill_tokens and self._prefill_tokens + tokens > engine.context:
            return True
        return self._cached + tokens + len(self._running) + 1 > engine.kv_tokens

    def _prefill(self, index: int, request: TraceRequest, tokens: int) -> None:
        if isnan(self._times.begun[index]):
            self._times.begun[index] = self.now
            self._fresh.append(index)
        group = self.engine.rates
        seconds = group.seconds(self._figures, tokens, pairs=tokens**2 / 2)
        if request.images:
            place, tower = self._prefill_tokens + BEFORE, group.work.tower
            times = tower.encodings(place, request.image_tokens, self.engine.chunk, request.images)
            seconds += group.tower_seconds(request.units / request.images) * times
        self._spend(seconds, self._cached)
        self._cached += tokens
        self._running[index] = end = self._steps + request.output - self._done.pop(index, 0)
        self._order.append(index)
        heappush(self._ends, (end, index))

    def _decode(self, until: float) -> None:
        count, engine = len(self._running), self.engine
        while count > 1 and self._cached + count > engine.kv_tokens:
            self._evict()
            count = len(self._running)
        base = self._base(count) + self._slope * self._cached
        growth = self._slope * count
        steps = self._ends_next() - self._steps
        steps = min(steps, max(1, (engine.kv_tokens - self._cached) // count))
        if self._fresh:
            steps = 1
        elif until < inf:
            left, half = until - self.now, base - growth / 2
            wanted = left / base
            if growth:
                wanted = (sqrt(half**2 + 2 * growth * left) - half) / growth
            steps = min(steps, max(1, ceil(wanted)))
        seconds = steps * base + growth * steps * (steps - 1) / 2
        self._spend(seconds, self._cached + count * steps / 2)
        self._cached += count * steps
        self._steps += steps
        self.most_cached = max(self.most_cached, self._cached)
        for index in self._fresh:
            self._times.first[index] = self.now
        self._fresh.clear()
        self._prefill_units = self._prefill_tokens = 0
        while self._running and self._ends_next() <= self._steps:
            _, index = heappop(self._ends)
            del self._running[index]
            request = self._requests[index]
            self._cached -= request.prompt + request.output
            self._times.ended[index] = self.now

    def _ends_next(self) -> int:
        """The step at which the next request ends, without evicted requests."""
        while self._running.get(self._ends[0][1]) != self._ends[0][0]:
            heappop(self._ends)
        return self._ends[0][0]

    def _evict(self) -> None:
        """Evict the request that was admitted last; it becomes the first in the queue."""
        while (index := self._order.pop()) not in self._running:
            pass
        request, end = self._requests[index], self._running.pop(index)
        self._done[index] = request.output - (end - self._steps)
        self._cached -= request.prompt + self._done[index]
        self.waiting.appendleft(index)
        self.evicted += 1

    def _base(self, count: int) -> float:
        """The seconds of a step, without reading cached tokens."""
        if count not in self._bases:
            self._bases[count] = self.engine.rates.seconds(self._figures, count)
        return self._bases[count]

    def _spend(self, seconds: float, cached: float) -> None:
        self.now += seconds
        self.busy += seconds
        self.running_seconds += seconds * len(self._running)
        self.cached_seconds += seconds * cached


def replay(
    engines: Sequence[SimulatedEngine], requests: Sequence[TraceRequest], *,
    queue: int, patience: float,
) -> tuple[TraceTimes, list[EngineLoad]]:  # fmt: skip
    """Send each request of a trace to the least busy engine.

    The requests are sorted by time, and fit the context. If images queue, ``queue`` requests with
    images may wait for their turn, each for ``patience`` seconds.
    """
    count = len(requests)
    times = TraceTimes(begun=[nan] * count, first=[nan] * count, ended=[nan] * count, refused=[])
    loads = [EngineLoad(engine, requests, times, patience) for engine in engines]
    gated = any(engine.gate is not None for engine in engines)
    for index, request in enumerate(requests):
        for load in loads:
            load.advance(request.at)
        if gated and request.units and sum(len(load.waiting) for load in loads) > queue:
            times.refused.append(index)
            continue
        best = min(loads, key=lambda load: (load.outstanding + 1) / load.engine.share)
        best.take(index)
    for load in loads:
        load.advance(inf)
    return times, loads
