"""A batch from its input to its result, and how far it is."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Final

from turbofit.batch.batch_input import Survey, open_input, pending
from turbofit.batch.batch_run import BatchRun, in_thread, run_together
from turbofit.batch.output_file import OutputFile
from turbofit.batch.request_body import BodyWriter, ImageLimits
from turbofit.batch.sender import Sender
from turbofit.batch.server_process import ServerProcess, server_plan
from turbofit.core.errors import UsageError
from turbofit.core.process.ports import open_files
from turbofit.core.process.progress import Step, under_way
from turbofit.core.struct import Struct, const, doc
from turbofit.core.version import __version__
from turbofit.launch.serve.runs import requests_at, waiting_words

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from turbofit.batch.batch_spec import BatchSpec, BatchTarget
    from turbofit.batch.item import BatchLine

__all__ = ["BatchJob", "BatchListener", "BatchProgress", "BatchResult"]

_TICK_SECONDS: Final = 1.0
#: Of the requests that run at once, one over so many more waits at the gateway, so that a place
#: that gets free is taken at once.
_WAITING: Final = 8
_FILES: Final = 65536

BATCH_SCHEMA: Final = "turbofit.batch/1"


class _InterruptedError(Exception):
    """Ends the reading of an input in its thread; nobody waits for that any more."""


class BatchListener:
    """Takes the events of a batch; a subclass overrides those that it wants."""

    def say(self, text: str) -> None:
        """One line that matters."""

    def tick(self, progress: BatchProgress) -> None:
        """About once a second, while items are sent."""

    def resumed(self, size: int) -> None:
        """So many bytes of the output are lines of earlier runs."""

    async def taken(self, line: BatchLine) -> None:
        """A line is written."""


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
        self._source = open_input(paths[0], spec)
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

    async def run(self) -> BatchResult:
        """Send what has no line yet.

        Raises:
            TurbofitError: why it could not go on; the same batch can be given again.
        """
        open_files(_FILES)  # a socket for each request; shells often allow 1,024
        with OutputFile(self._paths[1]) as output:
            progress = BatchProgress(0, output)
            self._task = asyncio.ensure_future(self._work(output, progress))
            if self.interrupted:
                self._task.cancel()
            try:
                await asyncio.wait((self._task,))
            finally:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)
            if not (self.interrupted and self._task.cancelled()):
                self._task.result()
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
        survey = await in_thread(Survey, self._source.items(), self._read)
        size = await in_thread(output.resume, survey, retry_failed=self._spec.retry_failed)
        if self._spec.in_order:
            survey.check_order()
        progress.total, progress.before = survey.total, output.lines
        before = f", {progress.before:,} of which have their line" if progress.before else ""
        self._listener.say(f"{progress.total:,} items{before}")
        self._listener.resumed(size)
        if progress.left:
            async with AsyncExitStack() as stack:
                await self._send(survey, output, progress, stack)

    async def _send(
        self, survey: Survey, output: OutputFile, progress: BatchProgress, stack: AsyncExitStack
    ) -> None:
        spec, target, server = self._spec, self._target, None
        url, key, limits, at_once = target.url, target.key, ImageLimits(), target.at_once
        if url is None:
            server, limits, at_once, places = await self._launched(stack)
            url, key = server.url, server.key
            given = target.request.concurrency if target.request else None
        else:
            given, places = at_once, await in_thread(requests_at, url)
        if text := waiting_words(min(given or 0, progress.left), places):
            self._listener.say(text)
        sender = await stack.enter_async_context(
            Sender(
                url, key, timeout=spec.timeout, waiting=progress.wait,
                patience=None if server else spec.patience,
            )
        )  # fmt: skip

        async def send() -> None:
            model = target.model or await sender.model()
            writer = BodyWriter(
                model, replace=bool(target.model) or server is not None,
                base=self._source.base, limits=limits, max_tokens=self._source.max_tokens,
            )  # fmt: skip
            progress.begin()
            await BatchRun(
                pending(self._source.items(), survey, self._read), output,
                lambda item: sender.line(item, writer), self._listener.taken,
                at_once=min(at_once, progress.left), in_order=spec.in_order,
            ).run()  # fmt: skip

        beside = [self._ticks(progress)]
        if server is not None:
            beside.append(server.keep(lambda: output.answered, sender.moved))
        try:
            await run_together([send()], beside)
        finally:
            progress.lowered = sender.lowered

    async def _launched(self, stack: AsyncExitStack) -> tuple[ServerProcess, ImageLimits, int, int]:
        """A server for this batch, ready: its limits, items at once, and items that it runs."""
        assert self._target.request is not None
        planned = await in_thread(
            server_plan, self._source, self._spec, self._target.request, self._read
        )
        self._listener.say(f"the most of an item: {planned.workload.text}")
        if unbounded := planned.workload.unbounded:
            self._listener.say(f"{unbounded:,} items do not bound their answers; --max-tokens does")
        server = ServerProcess(planned.options, self._listener.say)
        stack.push_async_callback(server.end)
        with under_way("starting the server"):
            await server.start()
        limits, places = await in_thread(
            server.limits_and_places, planned.request, shrink=self._spec.shrink
        )
        at_once = planned.request.concurrency or places + max(2, places // _WAITING)
        return server, limits, at_once, places

    async def _ticks(self, progress: BatchProgress) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            self._listener.tick(progress)

    def _read(self) -> None:
        """In another thread, while the input is read."""
        if self.interrupted:
            raise _InterruptedError


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


class BatchProgress:
    """How far a run is: ``total`` items of the input, of which ``before`` had their line.

    Args:
        total: of the input.
        output: counts their lines; those that it has now are of earlier runs.
        clock: seconds that only grow.
    """

    def __init__(
        self, total: int, output: OutputFile, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._output, self._clock = output, clock
        self.total, self.before = total, output.lines
        self._began: float | None = None
        #: Answers to requests that the server says it lowered.
        self.lowered = 0
        #: Why the batch waits at this moment; empty where it goes on.
        self.waiting = ""

    def begin(self) -> None:
        """Items are sent from now on."""
        self._began = self._clock()

    def wait(self, why: str) -> None:
        """It waits, or goes on where ``why`` is empty."""
        self.waiting = why

    @property
    def left(self) -> int:
        """Items without a line."""
        return self.total - self._output.lines

    @property
    def seconds(self) -> float:
        """Since items are sent; 0 before."""
        return 0.0 if self._began is None else self._clock() - self._began

    @property
    def rate(self) -> float:
        """Items a second of this run."""
        return (self._output.lines - self.before) / max(self.seconds, 1e-9)

    @property
    def step(self) -> Step:
        """All of it for people."""
        what = self.waiting or (f"{self.rate:,.1f}/s" if self.rate else "")
        detail = f"{self._output.failed:,} failed{', ' * bool(what)}{what}"
        return Step("sending", self._output.lines, self.total, detail=detail)
