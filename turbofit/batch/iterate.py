"""A batch as an iterator: it runs in a thread, a few lines in front of who takes them."""

from __future__ import annotations

import asyncio
import queue
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import msgspec

from turbofit.batch.batch_job import BatchJob, BatchListener
from turbofit.batch.batch_spec import BatchSpec
from turbofit.batch.item import BatchLine
from turbofit.batch.target import BatchTarget, target_of
from turbofit.core.process.log import LazyLogger
from turbofit.planning.request import PlanRequest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from turbofit.core.json_types import Options

__all__ = ["iterate"]

_LOG: Final = LazyLogger(__name__)
#: Lines that wait for who takes them; then the batch waits.
_AHEAD: Final = 256


def iterate(
    source: Path, output: Path, *, url: str | None, model: str | None, options: Options
) -> Iterator[BatchLine]:
    """The lines of a batch; nothing runs before the first is taken.

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
    runner = _Runner(BatchJob(paths, spec, target, listener := _Listener()), listener)
    try:
        size = listener.kept.get()
        if size is not None:
            yield from _kept(paths[1], size)
        while (line := listener.lines.get()) is not None:
            listener.room()
            yield line
    finally:
        runner.end()
    runner.check()


def _kept(path: Path, size: int) -> Iterator[BatchLine]:
    """Lines of earlier runs."""
    with path.open("rb") as file:
        while file.tell() < size:
            yield msgspec.json.decode(file.readline(), type=BatchLine)


class _Listener(BatchListener):
    """Hands lines to another thread."""

    def __init__(self) -> None:
        #: Bytes of earlier runs' lines; None where it ended before.
        self.kept: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.lines: queue.SimpleQueue[BatchLine | None] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(_AHEAD)
        self.loop: asyncio.AbstractEventLoop | None = None

    def say(self, text: str) -> None:
        _LOG.info("%s", text)

    def resumed(self, size: int) -> None:
        self.kept.put(size)

    async def taken(self, line: BatchLine) -> None:
        await self._room.acquire()
        body = None if line.response is None else line.response.body
        if isinstance(body, msgspec.Raw):
            line = msgspec.json.decode(msgspec.json.encode(line), type=BatchLine)
        self.lines.put(line)

    def room(self) -> None:
        """A line was taken."""
        assert self.loop is not None
        with suppress(RuntimeError):  # the loop is closed: all lines were handed over
            self.loop.call_soon_threadsafe(self._room.release)


class _Runner:
    """The thread."""

    def __init__(self, job: BatchJob, listener: _Listener) -> None:
        self._job, self._listener = job, listener
        self._error: BaseException | None = None
        self._began = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as exc:  # noqa: BLE001 - it is the iterating thread's
            self._error = exc
        finally:
            self._began.set()
            self._listener.kept.put(None)
            self._listener.lines.put(None)

    async def _main(self) -> Any:
        self._listener.loop = asyncio.get_running_loop()
        self._began.set()
        return await self._job.run()

    def end(self) -> None:
        """Nothing of it runs any more."""
        self._began.wait()
        loop = self._listener.loop
        with suppress(RuntimeError):  # as above
            if loop is not None:
                loop.call_soon_threadsafe(self._job.stop)
        self._thread.join()

    def check(self) -> None:
        """Raise the error that ended it."""
        if self._error is not None:
            raise self._error
