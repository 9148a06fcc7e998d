"""A batch as an iterator: it runs in a thread, a few lines in front of who takes them."""

from __future__ import annotations

import asyncio
import queue
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import msgspec

from turbofit.batch.batch_job import BatchJob, BatchListener
from turbofit.batch.batch_spec import BatchSpec, target_of
from turbofit.batch.item import BatchLine
from turbofit.core.process.log import LazyLogger
from turbofit.planning.request import PlanRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
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
    return _lines(output, lambda taker: BatchJob((source, output), spec, target, taker))


def _lines(output: Path, make_job: Callable[[_Taker], BatchJob]) -> Iterator[BatchLine]:
    taker = _Taker()
    job, loop, errors = make_job(taker), asyncio.new_event_loop(), []

    def run() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(job.run())
        except BaseException as exc:  # noqa: BLE001 - it is the iterating thread's
            errors.append(exc)
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()
            taker.news.put(None)

    def call(function: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop is closed: all lines were handed over
            loop.call_soon_threadsafe(function)

    thread = threading.Thread(target=run, name="batch", daemon=True)
    thread.start()
    try:
        if (size := taker.news.get()) is not None:
            with output.open("rb") as file:
                while file.tell() < size:
                    yield msgspec.json.decode(file.readline(), type=BatchLine)
                while taker.news.get() is not None:
                    call(taker.room.release)
                    yield msgspec.json.decode(file.readline(), type=BatchLine)
    finally:
        call(job.stop)
        thread.join()
    if errors:
        raise errors[0]


class _Taker(BatchListener):
    """Tells another thread of lines, which are read from the output."""

    def __init__(self) -> None:
        #: Bytes of earlier runs' lines, then a 1 for each line; None at the end.
        self.news: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.room = asyncio.Semaphore(_AHEAD)

    def say(self, text: str) -> None:
        _LOG.info("%s", text)

    def resumed(self, size: int) -> None:
        self.news.put(size)

    async def taken(self, line: BatchLine) -> None:  # noqa: ARG002 - the output has it
        await self.room.acquire()
        self.news.put(1)
