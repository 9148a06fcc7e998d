"""A batch from its input to its result."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

from turbofit.batch.batch_input import open_input
from turbofit.batch.batch_run import BatchRun, pending
from turbofit.batch.images import ImageLimits
from turbofit.batch.launched import limits_and_places, server_plan
from turbofit.batch.output_file import OutputFile
from turbofit.batch.progress import BatchProgress, BatchResult
from turbofit.batch.request_body import BodyWriter
from turbofit.batch.sender import Sender
from turbofit.batch.server_process import ServerProcess
from turbofit.batch.survey import Survey
from turbofit.batch.together import in_thread, run_together
from turbofit.core.errors import UsageError
from turbofit.core.process.ports import open_files
from turbofit.core.process.progress import under_way
from turbofit.core.version import __version__
from turbofit.launch.serve.runs import requests_at, waiting_words

if TYPE_CHECKING:
    from pathlib import Path

    from turbofit.batch.batch_input import BatchInput
    from turbofit.batch.batch_spec import BatchSpec
    from turbofit.batch.item import BatchLine
    from turbofit.batch.target import BatchTarget

__all__ = ["BatchJob", "BatchListener"]

_TICK_SECONDS: Final = 1.0
#: Of the requests that run at once, one over so many more waits at the gateway, so that a place
#: that gets free is taken at once.
_WAITING: Final = 8
_FILES: Final = 65536


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
        self._input, self._output = paths
        spec.check(url=target.url)
        self._spec, self._target = spec, target
        self._listener = listener or BatchListener()
        self._source: BatchInput = open_input(self._input, spec)
        if os.path.exists(self._output) and self._output.samefile(self._input):
            raise UsageError("input and output are one file", hint="name another output")
        self._task: asyncio.Task[None] | None = None
        self._progress = BatchProgress(0, 0, 0)
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
        with OutputFile(self._output) as output:
            self._task = asyncio.ensure_future(self._work(output))
            if self.interrupted:
                self._task.cancel()
            try:
                await asyncio.wait((self._task,))
            finally:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)
            if not (self.interrupted and self._task.cancelled()):
                self._task.result()
            return self._result(output)

    async def _work(self, output: OutputFile) -> None:
        survey = await in_thread(Survey, self._source.digests(), self._read)
        size = await in_thread(output.resume, survey, retry_failed=self._spec.retry_failed)
        if self._spec.in_order:
            survey.check_order()
        progress = BatchProgress(survey.total, output.answered, output.failed)
        self._progress = progress
        before = f", {progress.before:,} of which have their line" if progress.before else ""
        self._listener.say(f"{progress.total:,} items{before}")
        self._listener.resumed(size)
        if progress.left:
            async with AsyncExitStack() as stack:
                await self._send(survey, output, stack)

    async def _send(self, survey: Survey, output: OutputFile, stack: AsyncExitStack) -> None:
        target, server = self._target, None
        url, key, limits, at_once = target.url, target.key, ImageLimits(), target.at_once
        if url is None:
            server, limits, at_once = await self._launched(stack)
            url, key = server.url, server.key
        else:
            self._tell_waiting(at_once, await in_thread(requests_at, url))
        sender = await stack.enter_async_context(
            Sender(
                url, key, timeout=self._spec.timeout, waiting=self._waiting,
                patience=None if server else self._spec.patience,
            )
        )  # fmt: skip
        named = target.model if server is None else None

        async def send() -> None:
            writer = BodyWriter(
                named or await sender.model(), replace=bool(named) or server is not None,
                base=self._source.base, limits=limits, max_tokens=self._source.max_tokens,
            )  # fmt: skip
            await BatchRun(
                pending(self._source.items(), survey), output, self._progress,
                lambda item: sender.line(item, writer), at_once=min(at_once, self._progress.left),
                in_order=self._spec.in_order, taken=self._listener.taken,
            ).run()  # fmt: skip

        beside = [self._ticks()]
        if server is not None:
            beside.append(server.keep(lambda: output.answered, sender.moved))
        try:
            await run_together([send()], beside)
        finally:
            self._progress.lowered = sender.lowered

    async def _launched(self, stack: AsyncExitStack) -> tuple[ServerProcess, ImageLimits, int]:
        """A server for this batch, ready."""
        assert self._target.request is not None
        found = await in_thread(
            server_plan, self._source, self._spec, self._target.request, self._read
        )
        self._listener.say(f"the most of an item: {found.workload.text}")
        if found.workload.unbounded:
            self._listener.say(
                f"{found.workload.unbounded:,} items do not bound their answers; --max-tokens does"
            )
        server = ServerProcess(found.options, self._listener.say)
        stack.push_async_callback(server.end)
        with under_way("starting the server"):
            await server.start()
        limits, places = await limits_and_places(server, found.request, shrink=self._spec.shrink)
        given = found.request.concurrency
        self._tell_waiting(given or 0, places)
        return server, limits, given or places + max(2, places // _WAITING)

    def _tell_waiting(self, at_once: int, running: int) -> None:
        text = waiting_words(min(at_once, self._progress.left), running)
        if text:
            self._listener.say(text)

    async def _ticks(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            self._listener.tick(self._progress)

    def _waiting(self, why: str) -> None:
        self._progress.waiting = why

    def _read(self, _number: int) -> None:
        """In another thread, while the input is read."""
        if self.interrupted:
            raise _InterruptedError

    def _result(self, output: OutputFile) -> BatchResult:
        progress = self._progress
        return BatchResult(
            turbofit_version=__version__,
            input=str(self._input),
            output=str(self._output),
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
