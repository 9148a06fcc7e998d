"""Sends all items that have no line yet, so many at once, and writes their lines.

Only what is under way is held: the next items are read when there is room for them, and a line is
written when it is there. In the input's order, lines wait for those before them, and no item begins
that is more than `_AHEAD` places in front of the first that is missing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.batch.item import ItemError, encoded
from turbofit.batch.seen_names import SeenNames
from turbofit.batch.together import in_thread, run_together
from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from turbofit.batch.item import BatchItem, BatchLine
    from turbofit.batch.output_file import OutputFile
    from turbofit.batch.progress import BatchProgress
    from turbofit.batch.survey import Survey

__all__ = ["BatchRun", "pending"]

#: Items that are read in one go, and those of them that had their line before.
_READ: Final = 16
_SKIPPED: Final = 4096
#: In order: so many times the items at once may one be in front of another.
_AHEAD: Final = 8
_SYNC_SECONDS: Final = 1.0


def pending(items: Iterator[BatchItem], survey: Survey) -> Iterator[BatchItem | None]:
    """Items that have no line yet; None for each that has one.

    Raises:
        UsageError: the input is not what it was when it was read first.
    """
    seen = SeenNames(survey.total)
    count = 0
    for item in items:
        count += 1
        if not survey.holds(item.number, item.digest):
            raise _changed(f"at item {item.number}")
        fault = item.fault
        if item.custom_id is not None and not seen.add(item.custom_id) and fault is None:
            fault = ItemError("duplicate_custom_id", "an item before this one has the same name")
        if survey.done(item.number):
            yield None
        else:
            yield item if fault is item.fault else replace(item, fault=fault)
    if count != survey.total:
        raise _changed(f"it had {survey.total:,} items and has {count:,}")


def _changed(how: str) -> UsageError:
    return UsageError(
        f"the input has changed while it was read, {how}",
        hint="give the same command again once nobody writes it",
    )


class BatchRun:
    """One run.

    Args:
        items: what `pending` gives.
        output: where lines go.
        progress: what is counted.
        ask: the line of an item; what it raises ends the run.
        at_once: items under way at a time.
        in_order: lines in the input's order.
        taken: told of each line once it is written.
    """

    def __init__(  # noqa: PLR0913 - a constructor
        self,
        items: Iterator[BatchItem | None],
        output: OutputFile,
        progress: BatchProgress,
        ask: Callable[[BatchItem], Awaitable[BatchLine]],
        *,
        at_once: int,
        in_order: bool = False,
        taken: Callable[[BatchLine], Awaitable[None]] | None = None,
    ) -> None:
        self._items, self._output, self._progress = items, output, progress
        self._ask, self._at_once, self._taken = ask, at_once, taken
        self._ready: deque[BatchItem] = deque()
        self._reading = asyncio.Lock()
        self._begun = self._written = 0
        self._order: dict[int, BatchLine] | None = {} if in_order else None
        self._moved = asyncio.Condition()

    async def run(self) -> None:
        """Until every item has its line.

        Raises:
            TurbofitError: what ends the run; all lines until then are written.
        """
        self._progress.begin()
        try:
            await run_together((self._worker() for _ in range(self._at_once)), [self._sync()])
        finally:
            self._output.sync()

    async def _worker(self) -> None:
        while (taken := await self._next()) is not None:
            place, item = taken
            await self._finish(place, await self._ask(item))

    async def _next(self) -> tuple[int, BatchItem] | None:
        """The next item and its place in this run; None where there is none."""
        async with self._reading:
            if self._order is not None:
                most = _AHEAD * self._at_once
                async with self._moved:
                    await self._moved.wait_for(lambda: self._begun - self._written < most)
            while not self._ready:
                found = await in_thread(self._read)
                if found is None:
                    return None
                self._ready.extend(found)
            self._begun += 1
            return self._begun, self._ready.popleft()

    def _read(self) -> list[BatchItem] | None:
        """Some more items, perhaps none; None at the end of the input."""
        found: list[BatchItem] = []
        for skipped, item in enumerate(self._items):
            if item is not None:
                found.append(item)
            if len(found) == _READ or skipped == _SKIPPED:
                return found
        return found or None

    async def _finish(self, place: int, line: BatchLine) -> None:
        if self._order is None:
            await self._write(line)
            return
        self._order[place] = line
        async with self._moved:
            while (following := self._order.pop(self._written + 1, None)) is not None:
                self._written += 1
                await self._write(following)
            self._moved.notify_all()

    async def _write(self, line: BatchLine) -> None:
        failed = line.error is not None
        self._output.append(encoded(line), failed=failed)
        self._progress.count(failed=failed)
        if self._taken is not None:
            await self._taken(line)

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(_SYNC_SECONDS)
            await in_thread(self._output.sync)
