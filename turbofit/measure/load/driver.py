"""Drives a load: the warm-up, the measured window, and the end.

The load goes on until all requests that began in the window are answered, so that the last requests
also meet a busy server. A request that begins after the window does not count; it is broken off at
the end.
"""

from __future__ import annotations

import asyncio
import math
import random
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from operator import attrgetter
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from turbofit.core.errors import UnservedError
from turbofit.core.messages import PRETEND_SPEED
from turbofit.core.process.network import open_files
from turbofit.core.process.progress import Step
from turbofit.core.process.signals import stop_signals
from turbofit.core.struct import to_builtins
from turbofit.core.units import doubled, format_duration
from turbofit.core.version import REFERENCE, __version__
from turbofit.measure.load.client import LoadClient
from turbofit.measure.load.prompt import PromptWriter
from turbofit.measure.load.result import (
    ClientShare,
    ErrorCount,
    LoadResult,
    Window,
    spread,
    turns_of,
)
from turbofit.rehearsal.pretend.clock import HELD_UP, held_up_share

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from turbofit.gateway.http.about import ClockFacts
    from turbofit.measure.load.client import Answer
    from turbofit.measure.load.spec import LoadSpec

#: Seconds of pause after a failed request of a closed loop; each further failure doubles the pause.
_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
#: The failures in a row that end a load, for each request at once of a closed loop.
_HOPELESS: Final = 4
_LEAST_HOPELESS: Final = 8
#: The share of a CPU above which the client may limit the server.
_BUSY: Final = 0.8
_LATE: Final = 0.1
_FILES: Final = 65536
#: Seconds without a byte after which a request has stalled.
_SILENCE: Final = 120.0


class LoadRun:
    """One load from its beginning to its end.

    ``ask`` sends one request and raises no error; it gets the answer to the turn before, or None
    for the first turn of a conversation. ``tick`` is called each second.
    """

    def __init__(
        self,
        spec: LoadSpec,
        ask: Callable[[Answer | None], Awaitable[Answer]],
        tick: Callable[[LoadRun], None] = lambda _: None,
    ) -> None:
        self.spec, self._ask, self._tick = spec, ask, tick
        #: The answers of all requests that ended, in the order of their ends.
        self.answers: list[Answer] = []
        #: When the measured window opened (before: when the load began), and when it closed.
        self.opened = time.perf_counter()
        self.closed: float | None = None
        #: Why the load ended early; empty if it did not.
        self.stopped = ""
        #: The largest delay of an arrival, in seconds.
        self.late = 0.0
        #: Whether the window has opened; the requests of the window without an answer so far.
        self._open, self._left = False, 0
        #: Requests that began in the window; failed requests in a row.
        self._begun = self._failures = 0
        self._end = asyncio.Event()
        self._tasks: set[asyncio.Future[object]] = set()

    def stop(self, why: str = "interrupted") -> None:
        """End the load immediately; its answers so far count."""
        self._close()
        self.stopped = self.stopped or why
        self._end.set()

    def divide(self, by: float) -> None:
        """Divide all times by ``by``: a request takes ``by`` times as long as on the card."""
        for answer in self.answers:
            answer.divide(by)
        self.opened, self.late = self.opened / by, self.late / by
        self.closed = None if self.closed is None else self.closed / by

    async def run(self) -> None:
        """Send requests until the load ends; then break off the requests that are under way."""
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
        """Return how far the load is, in words for people."""
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
        """Send requests one after another, each after the last answer; pause after errors.

        A closed loop with N requests at once runs this method N times, side by side.
        """
        failures = 0
        while True:
            answer = await self._conversation()
            failures = failures + 1 if answer.kind else 0
            if failures:
                pause = doubled(_PAUSE, failures - 1, _LONGEST_PAUSE)
                await asyncio.sleep(max(pause, answer.retry_after))

    async def _arrivals(self, rate: float) -> None:
        """Send requests at random times (Poisson), whether or not earlier requests are answered."""
        due = time.perf_counter()
        while True:
            late = time.perf_counter() - due
            self.late = max(self.late, late)
            await asyncio.sleep(max(0.0, -late))
            self._spawn(self._conversation())
            due += random.expovariate(rate)

    async def _conversation(self) -> Answer:
        """Send the turns of a conversation, one after another; return the last answer."""
        answer = await self._request(None)
        for _ in range(1, self.spec.turns):
            if answer.kind:
                break
            await asyncio.sleep(self.spec.pause)
            answer = await self._request(answer)
        answer.said = ()
        return answer

    async def _request(self, before: Answer | None) -> Answer:
        """Send one request and count its answer; end the load if too many fail in a row."""
        counts = self.in_window
        self._left += counts
        self._begun += counts
        if counts and self._begun == self.spec.requests:
            self._close()
        answer = await self._ask(before)
        if before is not None:
            answer.turn, before.said = before.turn + 1, ()
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
        """Open the window once the requests of the warm-up are answered."""
        if not self._open and len(self.answers) >= self.spec.warm_up_requests:
            self._open, self.opened = True, time.perf_counter()

    def _close(self) -> None:
        """Close the window, and end the load once all requests that count are answered.

        The window is empty if the warm-up has not ended.
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
            now, left = time.perf_counter(), 1.0
            if self.in_window and seconds is not None:
                left = self.opened + seconds - now
                if left <= 0:
                    self._close()
            if now >= ticked + 1.0:
                ticked = now
                self._tick(self)
            await asyncio.sleep(min(max(left, 0.001), 0.2))

    def _spawn(self, work: Awaitable[object]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def summary(
    run: LoadRun,
    *,
    url: str,
    model: str,
    busy: float,
    asked: LoadSpec | None = None,
    forecast: str = "",
) -> LoadResult:
    """Return the results of an ended load.

    ``busy``: the CPU seconds that this process used in a second. ``asked``: the load that the
    person asked for, if another load was sent. ``forecast``: in words, the forecast by which time
    passes on the server's pretend GPUs.
    """
    window = Window(run.opened, run.opened if run.closed is None else run.closed)
    counted = [answer for answer in run.answers if answer.counts]
    good = [answer for answer in counted if answer.answered]
    answered = [answer for answer in run.answers if answer.answered]
    pieces_only = any(answer.output_tokens is None for answer in good)
    now = datetime.now(timezone.utc)
    split = urlsplit(url)
    without_password = split._replace(netloc=split.netloc.rpartition("@")[2])
    ttft, tpot, e2e = (spread(map(attrgetter(name), good)) for name in ("ttft", "tpot", "e2e"))
    return LoadResult(
        turbofit_version=__version__,
        created=now.isoformat(timespec="seconds"),
        url=without_password.geturl(),
        model=model,
        load=to_builtins((asked or run.spec).given()),
        seconds=round(window.seconds, 3),
        stopped=run.stopped,
        begun=len(counted),
        answered=len(good),
        errors=_errors(counted),
        warm_up_errors=sum(map(window.failed_before, run.answers)),
        requests_per_second=window.per_second(window.share, answered),
        output_tokens_per_second=window.per_second(window.tokens, answered),
        running=window.per_second(window.overlap, answered),
        prompt_tokens=_mean([answer.prompt_tokens for answer in good]),
        output_tokens=_mean([answer.tokens for answer in good]) or 0.0,
        counted="pieces" if pieces_only else "usage",
        ttft=ttft,
        tpot=tpot,
        e2e=e2e,
        client=ClientShare(busy=round(busy, 3), late=round(run.late, 3)),
        turns=turns_of(good) if run.spec.turns > 1 else (),
        forecast=forecast,
        warnings=tuple(_warnings(run, busy, pieces_only=pieces_only, forecast=forecast)),
    )


def _mean(values: Iterable[int | None]) -> float | None:
    """Return the mean of the known values; None if no value is known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _errors(counted: Sequence[Answer]) -> tuple[ErrorCount, ...]:
    kinds = Counter(answer.kind for answer in counted if answer.kind)
    examples = {answer.kind: answer.example for answer in reversed(counted)}
    return tuple(
        ErrorCount(kind=kind, count=count, example=examples[kind])
        for kind, count in kinds.most_common()
    )


def _warnings(run: LoadRun, busy: float, *, pieces_only: bool, forecast: str) -> Iterator[str]:
    """Yield the reasons why people should trust the results less."""
    if forecast and run.spec.ends_early:
        option = "--stop-early" if run.spec.stop_early else "--output-tokens 0"
        yield f"answers on pretend GPUs have no true length: leave {option} out"
    elif any(answer.pretend for answer in run.answers) and not forecast:
        yield PRETEND_SPEED
    if run.stopped:
        yield (
            f"it ended before its time: {run.stopped}; what was under way then is left out, so "
            "that rates are too low"
        )
    if busy > _BUSY:
        yield f"the load took {busy:.0%} of a CPU: the server may do more than these figures say"
    if run.late > _LATE:
        yield f"a request was sent {run.late:.1f} s after its time: the load is too slow"
    if pieces_only:
        yield "the server counts no tokens: pieces of its stream are counted, too few"


def refuse_held_up(before: ClockFacts, after: ClockFacts | None, passed: float) -> None:
    """Refuse to measure pretend GPUs that this host held up during the ``passed`` seconds.

    Raises:
        UnservedError: the host held the GPUs up for more than 5 % of the time, or the server does
            not say for how long.
    """
    if after is None:
        raise UnservedError("the server no longer tells its time", hint="see the server's log")
    if after.busy <= before.busy:
        raise UnservedError(
            "the clock has read no forward of this engine, so that no request took time",
            hint=f"it reads TurboMind of LMDeploy {REFERENCE}; `--clock 0` goes without a clock",
        )
    share = held_up_share(after.late - before.late, after.idle - before.idle, passed)
    if share > HELD_UP:
        # The next power of two at which this host keeps up with the clock.
        factor = 2 ** math.ceil(math.log2(max(2.0, share / HELD_UP) * max(1.0, before.factor)))
        raise UnservedError(
            f"this host is too slow for that load: it held the pretend GPUs up for {share:.0%} of "
            "the time",
            hint=f"--clock {factor} (of turbofit serve --pretend, or tune), or a smaller load",
        )


def bench(
    url: str,
    spec: LoadSpec,
    *,
    key: str | None = None,
    model: str | None = None,
    tick: Callable[[LoadRun], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> LoadResult:
    """Drive a load on a server and return what it measured; a signal ends it early.

    ``model``: None for the server's first model. ``tick`` is called each second. Pretend GPUs may
    be N times slower than the card: the load then takes N times as long, ``say`` receives a line
    that says so, and all times of the result are those of the card.

    Raises:
        UsageError: the options contradict each other, or the server refuses this client.
        UnservedError: the server does not answer, or this host held the pretend GPUs up.
    """
    spec.check()
    open_files(_FILES)  # each request needs a socket; shells often allow 1,024

    async def drive() -> LoadResult:
        """Ask the server for its model and clock, then drive the load at the pace of the clock."""
        async with LoadClient(url, key, timeout=spec.timeout, silence=_SILENCE) as client:
            name = model or await client.model()
            before = await client.clock()
        times = 1.0 if before is None else max(1.0, before.factor)
        slower = spec.slower(times)
        if times > 1:
            wait = slower.measured_seconds
            long = f", about {format_duration(wait)}" if wait else ""
            say(f"{before.words if before else ''}: the load takes {times:g} times as long{long}")
        wait = times * _SILENCE
        async with LoadClient(url, key, timeout=slower.timeout, silence=wait) as client:
            writer = PromptWriter(name, spec)

            async def ask(before: Answer | None) -> Answer:
                body = writer.body(() if before is None else before.said)
                answer = await client.ask(body)
                words = {"role": "assistant", "content": answer.text}
                answer.said = (*body["messages"], words) if spec.turns > 1 else ()
                return answer

            run = LoadRun(slower, ask, tick)
            loop = asyncio.get_running_loop()
            for number in stop_signals():
                loop.add_signal_handler(number, run.stop, signal.Signals(number).name)
            wall, cpu = time.perf_counter(), time.process_time()
            await run.run()
            passed = max(time.perf_counter() - wall, 1e-9)
            busy = (time.process_time() - cpu) / passed
            if before is not None and any(answer.answered for answer in run.answers):
                refuse_held_up(before, await client.clock(), passed)
            run.divide(times)
            forecast = "" if before is None else before.words
            return summary(run, url=url, model=name, busy=busy, asked=spec, forecast=forecast)

    return asyncio.run(drive())
