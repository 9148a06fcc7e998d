"""Sends all items that have no line yet, so many at once, and writes their lines.

Only what is under way is held: the next items are read when there is room for them, and a line is
written when it is there. In the input's order, lines wait for those before them, and no item begins
that is more than `_AHEAD` places in front of the first that is missing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeVar

from turbofit.batch.item import encoded

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator

    from turbofit.batch.item import BatchItem, BatchLine
    from turbofit.batch.output_file import OutputFile

__all__ = ["BatchRun", "in_thread", "run_together"]

T = TypeVar("T")

#: Items that are read in one go.
_READ: Final = 16
#: In order: so many times the items at once may one be in front of another.
_AHEAD: Final = 8
_SYNC_SECONDS: Final = 1.0


async def run_together(
    work: Iterable[Coroutine[Any, Any, None]], beside: Iterable[Coroutine[Any, Any, None]]
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


class BatchRun:
    """One run.

    Args:
        items: what `batch_input.pending` gives.
        output: where lines go.
        ask: the line of an item; what it raises ends the run.
        at_once: items under way at a time.
        in_order: lines in the input's order.
        taken: told of each line once it is written.
    """

    def __init__(
        self,
        items: Iterator[BatchItem],
        output: OutputFile,
        ask: Callable[[BatchItem], Awaitable[BatchLine]],
        taken: Callable[[BatchLine], Awaitable[None]],
        *,
        at_once: int,
        in_order: bool = False,
    ) -> None:
        self._items, self._output, self._ask, self._taken = items, output, ask, taken
        self._at_once, self._in_order = at_once, in_order
        self._ready: deque[BatchItem] = deque()
        self._reading = asyncio.Lock()
        #: Places of this run, from 1 on: items begun, and lines written in order.
        self._begun = self._written = 0
        self._waiting: dict[int, BatchLine] = {}
        self._moved = asyncio.Condition()

    async def run(self) -> None:
        """Until every item has its line.

        Raises:
            TurbofitError: what ends the run; all lines until then are written.
        """
        try:
            await run_together((self._worker() for _ in range(self._at_once)), [self._sync()])
        finally:
            self._output.sync()

    async def _worker(self) -> None:
        while (following := await self._next()) is not None:
            place, item = following
            line = await self._ask(item)
            if not self._in_order:
                await self._write(line)
                continue
            self._waiting[place] = line
            async with self._moved:
                while ready := self._waiting.pop(self._written + 1, None):
                    self._written += 1
                    await self._write(ready)
                self._moved.notify_all()

    async def _next(self) -> tuple[int, BatchItem] | None:
        """The next item and its place in this run; None where there is none."""
        async with self._reading:
            if self._in_order:
                most = _AHEAD * self._at_once
                async with self._moved:
                    await self._moved.wait_for(lambda: self._begun - self._written < most)
            if not self._ready:
                self._ready.extend(await in_thread(lambda: list(islice(self._items, _READ))))
            if not self._ready:
                return None
            self._begun += 1
            return self._begun, self._ready.popleft()

    async def _write(self, line: BatchLine) -> None:
        self._output.append(encoded(line), failed=line.error is not None)
        await self._taken(line)

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(_SYNC_SECONDS)
            await in_thread(self._output.sync)
