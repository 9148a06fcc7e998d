"""Runs a batch: sends the items that have no line in the output yet, many of them at once.

Only the items under way are in memory: the next ones are read when there is room, and each line is
written as soon as it comes.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections import deque
from contextlib import AsyncExitStack, suppress
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from turbofit.batch.batch_input import open_input
from turbofit.batch.batch_spec import BatchSpec, target_of
from turbofit.batch.output_file import BatchLine, OutputFile, Survey
from turbofit.batch.sender import Sender, request_body
from turbofit.batch.server_process import STARTING, ServerProcess, server_plan
from turbofit.core.errors import UsageError
from turbofit.core.process.log import LazyLogger
from turbofit.core.process.ports import open_files
from turbofit.core.process.progress import Step, tell, under_way
from turbofit.core.process.threads import in_thread
from turbofit.core.struct import Struct, const, doc
from turbofit.core.version import __version__
from turbofit.launch.serve.runs import requests_at, waiting_words
from turbofit.planning.request import PlanRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
    from pathlib import Path

    from turbofit.batch.batch_spec import BatchTarget
    from turbofit.batch.output_file import BatchItem
    from turbofit.core.json_types import Options

_LOG: Final = LazyLogger(__name__)

#: Seconds between two syncs of all lines to the disk, with a report of the progress.
_SECONDS: Final = 1.0
#: Per this many running requests one more waits at the gateway, to take a free place immediately.
_WAITING: Final = 8
_FILES: Final = 65536
#: Items that are read at once.
_READ: Final = 16

BATCH_SCHEMA: Final = "turbofit.batch/1"


class _StoppedError(Exception):
    """`BatchJob.stop` was called while the input was read."""


class BatchJob:
    """One run of a batch, from an input to an output.

    ``say`` receives each important line; ``written`` receives the number of new lines in the
    output: first those of earlier runs, even if there are none.

    Raises:
        UsageError: the input or the options are wrong.
    """

    def __init__(
        self,
        paths: tuple[Path, Path],
        spec: BatchSpec,
        target: BatchTarget,
        *,
        say: Callable[[str], None] = lambda _: None,
        written: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._paths, self._spec, self._target = paths, spec, target
        self._say, self._written = say, written
        spec.check(url=target.url)
        source = open_input(paths[0], spec)
        self._source = source._replace(items=lambda: self._until_stopped(source.items()))
        if os.path.exists(paths[1]) and paths[1].samefile(paths[0]):
            raise UsageError("input and output are one file", hint="name another output")
        self._task: asyncio.Task[None] | None = None
        self.interrupted = False
        #: The number of items, and how many of them had a line before this run.
        self._total = self._before = 0
        #: When the first item was sent.
        self._began: float | None = None
        self._sender: Sender | None = None

    def stop(self) -> None:
        """End the run soon, from any thread; all lines so far are kept."""
        self.interrupted = True
        if self._task is not None:
            with suppress(RuntimeError):  # the loop is closed: the run is over
                self._task.get_loop().call_soon_threadsafe(self._task.cancel)

    def _until_stopped(self, items: Iterator[BatchItem]) -> Iterator[BatchItem]:
        """Stop reading when `stop` was called: threads read the input, and cannot be cancelled."""
        for item in items:
            if self.interrupted:
                raise _StoppedError
            yield item

    async def run(self) -> BatchResult:
        """Send the items without a line; after an error the same batch can be run again."""
        open_files(_FILES)  # a socket for each request; shells often allow 1,024
        with OutputFile(self._paths[1]) as output:
            self._task = asyncio.create_task(self._work(output))
            if self.interrupted:
                self._task.cancel()
            try:
                await self._task
            except (asyncio.CancelledError, _StoppedError):
                if not self.interrupted:
                    raise
            return BatchResult(
                turbofit_version=__version__,
                input=str(self._paths[0]),
                output=str(self._paths[1]),
                items=self._total,
                answered=output.answered,
                failed=output.failed,
                left=self._total - output.lines,
                before=self._before,
                lowered=self._sender.lowered if self._sender else 0,
                seconds=round(self._seconds(), 3),
                items_per_second=round(self._rate(output), 3),
            )

    def _seconds(self) -> float:
        return 0.0 if self._began is None else time.monotonic() - self._began

    def _rate(self, output: OutputFile) -> float:
        """Items a second of this run; 0 before it sends any: earlier lines are of other runs."""
        seconds = self._seconds()
        return (output.lines - self._before) / seconds if seconds else 0.0

    async def _work(self, output: OutputFile) -> None:
        survey = await in_thread(Survey, self._source.items())
        await in_thread(output.resume, survey, retry_failed=self._spec.retry_failed)
        self._total, self._before = survey.total, output.lines
        before = f", {self._before:,} of which have their line" if self._before else ""
        self._say(f"{self._total:,} items{before}")
        self._written(self._before)
        if self._total > self._before:
            async with AsyncExitStack() as stack:
                await self._send(survey, output, stack)

    async def _send(self, survey: Survey, output: OutputFile, stack: AsyncExitStack) -> None:
        spec, target, server = self._spec, self._target, None
        url, key = target.url, target.key
        left = self._total - self._before
        if url is None:
            server, places = await self._launched(stack)
            url, key = server.url, server.key
        else:
            places = await in_thread(requests_at, url)
        at_once = target.at_once or places + max(2, places // _WAITING)
        if text := waiting_words(min(target.at_once, left), places):
            self._say(text)
        patience = None if server else spec.patience
        sender = Sender(url, key, timeout=spec.timeout, patience=patience)
        self._sender = await stack.enter_async_context(sender)

        async def send() -> None:
            make_body = partial(
                request_body,
                model=target.model or await sender.model(),
                replace=bool(target.model) or server is not None,
                base=self._source.base,
                max_tokens=self._source.max_tokens,
            )
            self._began = time.monotonic()
            await send_all(
                survey.pending(self._source.items()), output,
                lambda item: sender.line(item, make_body), self._written,
                at_once=min(at_once, left),
            )  # fmt: skip

        beside = [self._ticks(output, sender)]
        if server is not None:
            beside.append(server.ended())
        await run_together([send()], beside)

    async def _launched(self, stack: AsyncExitStack) -> tuple[ServerProcess, int]:
        """Start a server for this batch; returns it, ready, and how many items it runs at once."""
        assert self._target.request is not None
        workload, options = await in_thread(
            server_plan, self._source, self._spec, self._target.request
        )
        self._say(f"the most of an item: {workload.text}")
        if workload.unbounded:
            self._say(f"{workload.unbounded:,} items do not bound their answers; --max-tokens does")
        server = ServerProcess(options, self._say)
        stack.push_async_callback(server.end)
        with under_way(STARTING):
            await server.start()
        return server, await in_thread(server.places)

    async def _ticks(self, output: OutputFile, sender: Sender) -> None:
        """Sync all lines to the disk each second, and report the progress."""
        while True:
            await asyncio.sleep(_SECONDS)
            await in_thread(output.sync)
            rate = self._rate(output)
            what = sender.waits or (f"{rate:,.1f}/s" if rate else "")
            detail = ", ".join(filter(None, (f"{output.failed:,} failed", what)))
            tell(Step("sending", output.lines, self._total, detail=detail))


class BatchResult(Struct):
    """A batch at its end. ``seconds`` and the rate are of this run alone."""

    schema: Annotated[str, const(BATCH_SCHEMA)] = BATCH_SCHEMA
    turbofit_version: str
    input: str
    output: str
    items: int
    answered: int
    failed: int
    left: Annotated[int, doc("Items without a line, where a signal ended the run.")]
    before: Annotated[int, doc("Items that had their line before this run.")]
    lowered: Annotated[int, doc("Answers to requests that the server says it lowered.")] = 0
    seconds: float
    items_per_second: float


async def send_all(
    items: Iterator[BatchItem],
    output: OutputFile,
    ask: Callable[[BatchItem], Awaitable[BatchLine]],
    written: Callable[[int], None],
    *,
    at_once: int,
) -> None:
    """Send ``at_once`` items at a time and write lines, until all are sent or ``ask`` raises."""
    reading = asyncio.Lock()
    ready: deque[BatchItem] = deque()

    async def work() -> None:
        while True:
            async with reading:
                ready.extend([] if ready else await in_thread(list, islice(items, _READ)))
                if not ready:
                    return
                item = ready.popleft()
            line = await ask(item)
            output.append(msgspec.json.encode(line) + b"\n", failed=line.error is not None)
            written(1)

    try:
        await run_together(work() for _ in range(at_once))
    finally:
        output.sync()


async def run_together(
    work: Iterable[Coroutine[Any, Any, None]], beside: Iterable[Coroutine[Any, Any, None]] = ()
) -> None:
    """Wait until all work is done or any coroutine fails; then cancel all that still run.

    The first error is raised, also one of ``beside``, whose coroutines need not end by themselves.
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


def iterate(
    source: Path, output: Path, *, url: str | None, model: str | None, options: Options
) -> Iterator[BatchLine]:
    """A batch's lines; taking the first one starts a thread. `UsageError`: a wrong option."""
    known = {name: options[name] for name in BatchSpec.model_fields if name in options}
    planned = {k: v for k, v in options.items() if k not in known and k != "api_key"}
    spec = BatchSpec.of(**known)
    request = None
    if model is not None or planned:
        request = PlanRequest.of(**{**planned, "model": model or ""})
    target = target_of(url, options.get("api_key"), request)
    return _lines((source, output), spec, target)


def _lines(paths: tuple[Path, Path], spec: BatchSpec, target: BatchTarget) -> Iterator[BatchLine]:
    #: The numbers of new lines in the output; None at the end.
    news: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    job = BatchJob(paths, spec, target, say=lambda text: _LOG.info("%s", text), written=news.put)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(job.run())
        except BaseException as exc:  # noqa: BLE001 - raised in the iterating thread
            errors.append(exc)
        finally:
            news.put(None)

    thread = threading.Thread(target=run, name="batch", daemon=True)
    thread.start()
    try:
        if (lines := news.get()) is not None:
            with paths[1].open("rb") as file:
                while lines is not None:
                    for _ in range(lines):
                        yield msgspec.json.decode(file.readline(), type=BatchLine)
                    lines = news.get()
    finally:
        job.stop()
        thread.join()
    if errors:
        raise errors[0]
