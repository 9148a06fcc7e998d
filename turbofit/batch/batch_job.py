"""A batch from its input to its result: what has no line yet is sent, so many items at once.

Only what is under way is held: the next items are read when there is room for them, and a line is
written when it is there. In the input's order, lines wait for those before them, and no item begins
that is more than `_AHEAD` times the items at once in front of the first that is missing.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections import deque
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import msgspec

from turbofit.batch.batch_input import open_input
from turbofit.batch.batch_spec import BatchSpec, target_of
from turbofit.batch.item import BatchLine
from turbofit.batch.output_file import OutputFile, Survey
from turbofit.batch.request_body import BodyWriter, ImageLimits
from turbofit.batch.sender import Sender
from turbofit.batch.server_process import STARTING, ServerProcess, server_plan
from turbofit.core.errors import UsageError
from turbofit.core.process.log import LazyLogger
from turbofit.core.process.ports import open_files
from turbofit.core.process.progress import Step, under_way
from turbofit.core.struct import Struct, const, doc
from turbofit.core.version import __version__
from turbofit.launch.serve.runs import requests_at, waiting_words
from turbofit.planning.request import PlanRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
    from pathlib import Path

    from turbofit.batch.batch_spec import BatchTarget
    from turbofit.batch.item import BatchItem
    from turbofit.core.json_types import Options

__all__ = [
    "BatchJob",
    "BatchListener",
    "BatchProgress",
    "BatchResult",
    "in_thread",
    "iterate",
    "run_together",
    "send_all",
]

T = TypeVar("T")
_LOG: Final = LazyLogger(__name__)

#: After which all lines go to the disk, and the progress is told.
_SECONDS: Final = 1.0
#: Of the requests that run at once, one over so many more waits at the gateway, so that a place
#: that gets free is taken at once.
_WAITING: Final = 8
_FILES: Final = 65536
#: Items that are read in one go.
_READ: Final = 16
_AHEAD: Final = 8

BATCH_SCHEMA: Final = "turbofit.batch/1"


class _InterruptedError(Exception):
    """Ends the reading of an input in its thread; nobody waits for that any more."""


class BatchListener:
    """Takes the events of a batch; a subclass overrides those that it wants."""

    def say(self, text: str) -> None:
        """One line that matters."""

    def tick(self, progress: BatchProgress) -> None:
        """About once a second, while items are sent."""

    def written(self, lines: int) -> None:
        """So many lines more stand in the output; those of earlier runs come first, even if 0."""


class BatchJob:
    """One run of a batch.

    Args:
        paths: input and output.
        spec: the options.
        target: who answers.
        listener: who is told.

    Raises:
        UsageError: the input or the options are wrong.
    """

    def __init__(
        self,
        paths: tuple[Path, Path],
        spec: BatchSpec,
        target: BatchTarget,
        listener: BatchListener | None = None,
    ) -> None:
        self._paths, self._spec, self._target = paths, spec, target
        self._listener = listener or BatchListener()
        spec.check(url=target.url)
        source = open_input(paths[0], spec)
        self._source = source._replace(items=lambda: self._until_stopped(source.items()))
        if os.path.exists(paths[1]) and paths[1].samefile(paths[0]):
            raise UsageError("input and output are one file", hint="name another output")
        self._task: asyncio.Task[None] | None = None
        #: Whether `stop` ended it.
        self.interrupted = False

    def stop(self) -> None:
        """End it soon, from its event loop; all lines so far are kept."""
        self.interrupted = True
        if self._task is not None:
            self._task.cancel()

    def _until_stopped(self, items: Iterator[BatchItem]) -> Iterator[BatchItem]:
        """Threads read the input, and cannot be cancelled."""
        for item in items:
            if self.interrupted:
                raise _InterruptedError
            yield item

    async def run(self) -> BatchResult:
        """Send what has no line yet.

        Raises:
            TurbofitError: why it could not go on; the same batch can be given again.
        """
        open_files(_FILES)  # a socket for each request; shells often allow 1,024
        with OutputFile(self._paths[1]) as output:
            progress = BatchProgress(output)
            self._task = asyncio.ensure_future(self._work(output, progress))
            if self.interrupted:
                self._task.cancel()
            try:
                await self._task
            except asyncio.CancelledError:
                if not self.interrupted:
                    raise
            return BatchResult(
                turbofit_version=__version__,
                input=str(self._paths[0]),
                output=str(self._paths[1]),
                errors=str(output.errors_path) if output.failed else None,
                items=progress.total,
                answered=output.answered,
                failed=output.failed,
                left=progress.left,
                before=progress.before,
                lowered=progress.lowered,
                seconds=round(progress.seconds, 3),
                items_per_second=round(progress.rate, 3),
            )

    async def _work(self, output: OutputFile, progress: BatchProgress) -> None:
        survey = await in_thread(Survey, self._source.items())
        await in_thread(output.resume, survey, retry_failed=self._spec.retry_failed)
        if self._spec.in_order:
            survey.check_order()
        progress.total, progress.before = survey.total, output.lines
        before = f", {progress.before:,} of which have their line" if progress.before else ""
        self._listener.say(f"{progress.total:,} items{before}")
        self._listener.written(progress.before)
        if progress.left:
            async with AsyncExitStack() as stack:
                await self._send(survey, output, progress, stack)

    async def _send(
        self, survey: Survey, output: OutputFile, progress: BatchProgress, stack: AsyncExitStack
    ) -> None:
        spec, target, server = self._spec, self._target, None
        url, key, limits = target.url, target.key, ImageLimits()
        if url is None:
            server, limits, places = await self._launched(stack)
            url, key = server.url, server.key
        else:
            places = await in_thread(requests_at, url)
        at_once = target.at_once or places + max(2, places // _WAITING)
        if text := waiting_words(min(target.at_once, progress.left), places):
            self._listener.say(text)
        patience = None if server else spec.patience
        sender = await stack.enter_async_context(
            Sender(url, key, timeout=spec.timeout, patience=patience, waiting=progress.wait)
        )

        async def send() -> None:
            model = target.model or await sender.model()
            writer = BodyWriter(
                model, replace=bool(target.model) or server is not None,
                base=self._source.base, limits=limits, max_tokens=self._source.max_tokens,
            )  # fmt: skip
            progress.began = time.monotonic()
            await send_all(
                survey.pending(self._source.items()), output,
                lambda item: sender.line(item, writer), self._listener.written,
                at_once=min(at_once, progress.left), in_order=spec.in_order,
            )  # fmt: skip

        beside = [self._ticks(progress)]
        if server is not None:
            beside.append(server.ended())
        try:
            await run_together([send()], beside)
        finally:
            progress.lowered = sender.lowered

    async def _launched(self, stack: AsyncExitStack) -> tuple[ServerProcess, ImageLimits, int]:
        """A server for this batch, ready: its limits, and the items that it runs at once."""
        assert self._target.request is not None
        planned = await in_thread(server_plan, self._source, self._spec, self._target.request)
        self._listener.say(f"the most of an item: {planned.workload.text}")
        if unbounded := planned.workload.unbounded:
            self._listener.say(f"{unbounded:,} items do not bound their answers; --max-tokens does")
        server = ServerProcess(planned.options, self._listener.say)
        stack.push_async_callback(server.end)
        with under_way(STARTING):
            await server.start()
        limits, places = await in_thread(
            server.limits_and_places, planned.request, shrink=self._spec.shrink
        )
        return server, limits, places

    async def _ticks(self, progress: BatchProgress) -> None:
        while True:
            await asyncio.sleep(_SECONDS)
            await in_thread(progress.output.sync)
            self._listener.tick(progress)


class BatchResult(Struct):
    """A batch at its end. ``seconds`` and the rate are of this run alone."""

    schema: Annotated[str, const(BATCH_SCHEMA)] = BATCH_SCHEMA
    turbofit_version: str
    input: str
    output: str
    errors: Annotated[str | None, doc("The file of the failures; null where there are none.")]
    items: int
    answered: int
    failed: int
    left: Annotated[int, doc("Items without a line, where a signal ended the run.")]
    before: Annotated[int, doc("Items that had their line before this run.")]
    lowered: Annotated[int, doc("Answers to requests that the server says it lowered.")] = 0
    seconds: float
    items_per_second: float


@dataclass
class BatchProgress:
    """How far a run is: ``total`` items of the input, of which ``before`` had their line.

    ``output`` counts the lines. Items are sent since ``began``. ``lowered``: answers to requests
    that the server says it lowered. ``waiting``: why nothing goes on at this moment.
    """

    output: OutputFile
    total: int = 0
    before: int = 0
    began: float | None = None
    lowered: int = 0
    waiting: str = ""

    def wait(self, why: str) -> None:
        """It waits, or goes on where ``why`` is empty."""
        self.waiting = why

    @property
    def left(self) -> int:
        """Items without a line."""
        return self.total - self.output.lines

    @property
    def seconds(self) -> float:
        """Since items are sent; 0 before."""
        return 0.0 if self.began is None else time.monotonic() - self.began

    @property
    def rate(self) -> float:
        """Items a second of this run."""
        return (self.output.lines - self.before) / max(self.seconds, 1e-9)

    @property
    def step(self) -> Step:
        """All of it for people."""
        what = self.waiting or (f"{self.rate:,.1f}/s" if self.rate else "")
        detail = f"{self.output.failed:,} failed{', ' * bool(what)}{what}"
        return Step("sending", self.output.lines, self.total, detail=detail)


async def send_all(
    items: Iterator[BatchItem],
    output: OutputFile,
    ask: Callable[[BatchItem], Awaitable[BatchLine]],
    written: Callable[[int], None],
    *,
    at_once: int,
    in_order: bool = False,
) -> None:
    """Send items and write their lines, until every item has its line.

    Args:
        items: what `Survey.pending` gives.
        output: where lines go.
        ask: the line of an item; what it raises ends the run.
        written: told of each line.
        at_once: items under way at a time.
        in_order: lines in the input's order.

    Raises:
        TurbofitError: what ends the run; all lines until then are written.
    """
    room, reading = asyncio.Semaphore(at_once), asyncio.Lock()
    ready: deque[BatchItem] = deque()
    #: Set when the line of the last item that has begun is written.
    last = asyncio.Event()
    last.set()

    async def work() -> None:
        nonlocal last
        while True:
            async with room:
                async with reading:
                    ready.extend([] if ready else await in_thread(list, islice(items, _READ)))
                    if not ready:
                        return
                    item = ready.popleft()
                    before, last = last, asyncio.Event()
                    mine = last
                line = await ask(item)
            if in_order:
                await before.wait()
            output.append(msgspec.json.encode(line) + b"\n", failed=line.error is not None)
            written(1)
            mine.set()

    try:
        await run_together(work() for _ in range(at_once * (_AHEAD if in_order else 1)))
    finally:
        output.sync()


async def run_together(
    work: Iterable[Coroutine[Any, Any, None]], beside: Iterable[Coroutine[Any, Any, None]] = ()
) -> None:
    """Wait for all of the work, or for the first error; then nothing of either runs any more.

    Args:
        work: what is to be done.
        beside: what goes on meanwhile, and has no end.
    """
    tasks = {asyncio.ensure_future(coroutine) for coroutine in work}
    left = everything = tasks | {asyncio.ensure_future(coroutine) for coroutine in beside}
    try:
        while left & tasks:
            done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in everything:
            task.cancel()
        await asyncio.gather(*everything, return_exceptions=True)


async def in_thread(function: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    """As `asyncio.to_thread`; a caller that is cancelled waits until the thread has ended.

    So a file that the thread uses is not closed too early.
    """
    task = asyncio.ensure_future(asyncio.to_thread(function, *arguments, **keywords))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise


class _Reader(BatchListener):
    """Tells another thread how many lines it can read from the output."""

    def __init__(self) -> None:
        #: None at the end.
        self.news: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def say(self, text: str) -> None:
        _LOG.info("%s", text)

    def written(self, lines: int) -> None:
        self.news.put(lines)


def iterate(
    source: Path, output: Path, *, url: str | None, model: str | None, options: Options
) -> Iterator[BatchLine]:
    """The lines of a batch, which runs in a thread; nothing runs before the first is taken.

    Raises:
        UsageError: an option is wrong.
    """
    known = {name: options[name] for name in BatchSpec.model_fields if name in options}
    planned = {k: v for k, v in options.items() if k not in known and k != "api_key"}
    spec = BatchSpec.of(**known)
    request = None
    if model is not None or planned:
        request = PlanRequest.of(**{**planned, "model": model or ""})
    target = target_of(url, options.get("api_key"), request)
    return _lines((source, output), spec, target)


def _lines(paths: tuple[Path, Path], spec: BatchSpec, target: BatchTarget) -> Iterator[BatchLine]:
    reader = _Reader()
    job, loop = BatchJob(paths, spec, target, reader), asyncio.new_event_loop()
    errors: list[BaseException] = []

    def run() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(job.run())
        except BaseException as exc:  # noqa: BLE001 - it is the iterating thread's
            errors.append(exc)
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()
            reader.news.put(None)

    thread = threading.Thread(target=run, name="batch", daemon=True)
    thread.start()
    try:
        if (lines := reader.news.get()) is not None:
            with paths[1].open("rb") as file:
                while lines is not None:
                    for _ in range(lines):
                        yield msgspec.json.decode(file.readline(), type=BatchLine)
                    lines = reader.news.get()
    finally:
        with suppress(RuntimeError):  # the loop is closed: all lines were handed over
            loop.call_soon_threadsafe(job.stop)
        thread.join()
    if errors:
        raise errors[0]
