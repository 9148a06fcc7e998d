"""Runs a batch: sends the items that have no output line yet, many of them at once.

Memory has only the items that the server works on. The next items are read when a place is free,
and each line is written when its answer arrives.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Final

import msgspec

from turbofit.batch_jobs.batch_input import BatchSpec, open_input
from turbofit.batch_jobs.output_file import BatchItem, BatchLine, OutputFile, Survey
from turbofit.batch_jobs.sender import Sender, request_body
from turbofit.core.errors import LaunchError, UsageError, error_from
from turbofit.core.messages import counted
from turbofit.core.process.interpreter import in_thread
from turbofit.core.process.network import open_files
from turbofit.core.process.progress import Step, tell
from turbofit.core.process.variables import without_options
from turbofit.core.struct import Struct, const, doc
from turbofit.core.version import __version__
from turbofit.serving.process.guard import guarded
from turbofit.serving.runs import requests_at

SERVE: Final = (sys.executable, "-m", "turbofit", "serve")
#: Seconds for a stopped server to drain and free its memory, before the server is killed.
_END_SECONDS: Final = 90.0
#: Seconds between two syncs of the output to the disk; each sync also reports the progress.
_SECONDS: Final = 1.0
#: For this many running requests, the batch sends one more, which waits at the gateway for the next
#: free place.
_WAITING: Final = 8
#: The number of items that are sent at once to a server whose capacity is unknown.
_AT_ONCE: Final = 64
BATCH_SCHEMA: Final = "turbofit.batch/1"


@asynccontextmanager
async def serving(
    words: Sequence[str], say: Callable[[str], None]
) -> AsyncIterator[tuple[str, str, Awaitable[None]]]:
    """Run a server until the context ends; ``words`` are the arguments of ``turbofit serve``.

    The context has the URL and the key of the server, and an awaitable. The awaitable raises a
    `TurbofitError` if the server ends by itself. ``say`` receives the server's messages.

    Raises:
        TurbofitError: the server does not open.
    """
    key = secrets.token_hex(16)
    process = await asyncio.create_subprocess_exec(
        *guarded([*SERVE, "--port", "0", *words]), stdin=DEVNULL, stdout=PIPE, stderr=PIPE,
        env={**without_options(os.environ), "TURBOFIT_API_KEY": key}, limit=1 << 20,
        start_new_session=True,  # Ctrl-C reaches only this process, which ends the server
    )  # fmt: skip
    ended = asyncio.ensure_future(_follow(process, say))
    try:
        assert process.stdout is not None
        # The server's only line on stdout is its address, once it serves.
        url = (await process.stdout.readline()).decode(errors="replace").strip()
        if not url:
            await ended
        yield url, key, asyncio.shield(ended)
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                process.send_signal(number)
            await asyncio.wait((ended,), timeout=_END_SECONDS)
        await asyncio.gather(ended, return_exceptions=True)


async def _follow(process: asyncio.subprocess.Process, say: Callable[[str], None]) -> None:
    """Pass the server's messages on; once the server has ended, raise its error."""
    assert process.stderr is not None
    # `turbofit serve` ends with the lines ``error: …`` and ``hint: …``.
    last_line, error = "it said nothing", {"error": "", "hint": ""}
    while line := await process.stderr.readline():
        last_line = line.decode(errors="replace").rstrip()
        word, _, text = last_line.partition(": ")
        if word in error:
            error[word] = text
        else:
            say(last_line)
    code = await process.wait()
    if error["error"]:
        raise error_from({"exit_code": code, "message": error["error"], "hint": error["hint"]})
    raise LaunchError(
        f"the server ended with {code}: {last_line}",
        hint="turbofit report latest shows why; the same command continues the batch",
    )


class BatchResult(Struct):
    """The result of a batch; ``seconds`` and ``items_per_second`` are of the last run alone."""

    schema: Annotated[str, const(BATCH_SCHEMA)] = BATCH_SCHEMA
    turbofit_version: str
    input: str
    output: str
    items: int
    answered: int
    failed: int
    left: Annotated[int, doc("Items without a line, if a signal ended the run.")]
    before: Annotated[int, doc("Items that had their line before this run.")]
    lowered: Annotated[int, doc("Answers to requests that the server says it lowered.")] = 0
    seconds: float
    items_per_second: float


class BatchJob:
    """One run of a batch; ``paths`` are its input and its output.

    ``key`` is the API key of the server at the spec's URL. If the spec has no URL, the job starts a
    server, and ``words`` are further arguments of its ``turbofit serve``. ``say`` receives the
    messages of the job and of the server.

    Raises:
        UsageError: the input or the options are wrong.
    """

    def __init__(
        self,
        paths: tuple[Path, Path],
        spec: BatchSpec,
        *,
        key: str | None = None,
        words: Sequence[str] = (),
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._paths, self._spec, self._say = paths, spec, say
        self._key, self._words = key, words
        self._input = open_input(paths[0], spec)
        if os.path.exists(paths[1]) and paths[1].samefile(paths[0]):
            raise UsageError("input and output are one file", hint="name another output")
        #: Whether a signal has cancelled the run. A cancelled run keeps all its lines.
        self.interrupted = False
        #: The number of items, and the number of items that had a line before this run.
        self._total = self._before = 0
        #: When the first item was sent.
        self._began: float | None = None
        self._sender: Sender | None = None

    async def run(self) -> BatchResult:
        """Send all items that have no output line yet, and return the counts of the batch.

        After an error or a signal, the same batch can be run again to continue.
        """
        open_files(1 << 16)  # a socket for each request; shells often allow 1,024
        with closing(OutputFile(self._paths[1])) as output:
            try:
                await self._work(output)
            except asyncio.CancelledError:
                self.interrupted = True
            finally:
                output.sync()
            seconds = 0.0 if self._began is None else time.monotonic() - self._began
            rate = (output.lines - self._before) / seconds if seconds else 0.0
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
                seconds=round(seconds, 3),
                items_per_second=round(rate, 3),
            )

    async def _work(self, output: OutputFile) -> None:
        """Find the items without a line, and send them."""
        survey = await in_thread(Survey, self._input.items())
        await in_thread(output.resume, survey)
        self._total, self._before = survey.total, output.lines
        before = f", {self._before:,} with a line already" if self._before else ""
        self._say(f"{counted(self._total, 'item')}{before}")
        if self._total > self._before:
            async with AsyncExitStack() as stack:
                await self._send(survey, output, stack)

    async def _send(self, survey: Survey, output: OutputFile, stack: AsyncExitStack) -> None:
        """Send all items without a line, to the server at the URL or to a server of the batch.

        ``stack`` closes the sender, and ends the server of the batch.
        """
        spec, unanswered = self._spec, self._total - self._before
        # ``watchers`` wait for the end of the batch's own server; with a URL there are none.
        url, key, model, watchers = spec.url or "", self._key, spec.model, list[Awaitable[None]]()
        if not url:
            server = serving(self._words, self._say)
            url, key, ended = await stack.enter_async_context(server)
            watchers, model = [ended], None  # the items get the server's own name of the model
        places = await in_thread(requests_at, url)
        usual = places + max(2, places // _WAITING) if places else _AT_ONCE
        patience = None if watchers else spec.patience
        sender = Sender(url, key, timeout=spec.timeout, patience=patience)
        self._sender = await stack.enter_async_context(sender)

        async def send() -> None:
            make_body = partial(
                request_body, model=model or await sender.model(), replace=bool(model or watchers),
                base=self._input.base, max_tokens=self._input.max_tokens,
            )  # fmt: skip
            self._began = time.monotonic()
            pending = survey.pending(self._input.items())
            at_once = min(spec.concurrency or usual, unanswered)
            await send_all(
                pending, output, lambda item: sender.line(item, make_body), at_once=at_once
            )

        work = (send(), self._ticks(output, sender), *watchers)
        await run_together(work, asyncio.FIRST_COMPLETED)

    async def _ticks(self, output: OutputFile, sender: Sender) -> None:
        """Sync all lines to the disk each second, and report the progress."""
        while True:
            await asyncio.sleep(_SECONDS)
            await in_thread(output.sync)
            detail = ", ".join(filter(None, (f"{output.failed:,} failed", sender.waits)))
            tell(Step("sending", output.lines, self._total, detail=detail))


async def send_all(
    items: Iterator[BatchItem],
    output: OutputFile,
    ask: Callable[[BatchItem], Awaitable[BatchLine]],
    *,
    at_once: int,
) -> None:
    """Send items, ``at_once`` at a time, and write the output line of each.

    ``ask`` sends one item and returns its line. The function returns when all items have a line, or
    raises the first error of ``ask``.
    """
    reading = asyncio.Lock()
    ready: deque[BatchItem] = deque()

    async def work() -> None:
        while True:
            async with reading:
                # The first task that finds no item reads the next 16 for all tasks.
                ready.extend([] if ready else await in_thread(list, islice(items, 16)))
                if not ready:
                    return
                item = ready.popleft()
            line = await ask(item)
            output.append(msgspec.json.encode(line) + b"\n", failed=line.error is not None)

    await run_together((work() for _ in range(at_once)), asyncio.FIRST_EXCEPTION)


async def run_together(work: Iterable[Awaitable[None]], until: str) -> None:
    """Run tasks together, then cancel the tasks that still run, and raise the first error.

    With ``until`` `asyncio.FIRST_COMPLETED` the tasks run until one task ends. With
    `asyncio.FIRST_EXCEPTION` they run until all tasks end or one task fails.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=until)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
