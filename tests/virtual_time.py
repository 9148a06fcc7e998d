"""An event loop whose clock jumps to the next timer as soon as nothing else is left to do.

A wait of a minute costs nothing, and what is to happen before a timer has happened before it, on
the slowest machine too. Sockets and subprocesses are outside of that time: tests of those use
`asyncio.run`, and events.
"""

from __future__ import annotations

import asyncio
import selectors
import threading
import time
from collections.abc import Callable, Coroutine
from functools import partial
from math import ceil
from typing import Any, TypeVar
from unittest.mock import patch

from tests.support.waiting import HANG

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in virtual time; `time.monotonic` and `time.perf_counter` show it as well.

    Threads that run already keep the real time: the loop of a fixture's server would set timers
    that are days away for it.

    Raises:
        AssertionError: Everything waits, and for no timer: nothing would ever happen again.
    """
    loop = _Loop()
    others = frozenset(threading.enumerate()) - {threading.current_thread()}
    clocks = {
        name: partial(_time, loop, others, getattr(time, name))
        for name in ("monotonic", "perf_counter")
    }
    with patch.multiple(time, **clocks):
        try:
            return loop.run_until_complete(main)
        finally:
            _end(loop)


def _time(loop: _Loop, others: frozenset[threading.Thread], real: Callable[[], float]) -> float:
    return real() if others and threading.current_thread() in others else loop.time()


async def settled() -> None:
    """Wait until nothing happens any more without a timer; takes a microsecond of virtual time."""
    await asyncio.sleep(1e-6)


def _end(loop: _Loop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


class _Selector(selectors.DefaultSelector):
    """Moves the clock where a selector would wait for the next timer."""

    def __init__(self) -> None:
        super().__init__()
        # Sums of times are exact until the next power of two, which is days away: what is left of
        # a minute is 60 seconds, and not a little more, which a client would be told as 61.
        self.now = max(2.0**20, ceil(time.monotonic()))
        #: Calls in threads that have not come back; the clock stands meanwhile.
        self.threads = 0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if timeout is not None and not self.threads:
            self.now += timeout
            return ready
        assert self.threads, "everything waits, and for no timer"
        ready = super().select(HANG)
        assert ready, f"no thread came back within {HANG:g} s"
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._moved = _Selector()
        super().__init__(self._moved)

    def time(self) -> float:
        return self._moved.now

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:
        future = super().run_in_executor(executor, func, *args)
        self._moved.threads += 1
        future.add_done_callback(self._came_back)
        return future

    async def shutdown_default_executor(self, *args: Any) -> None:
        self._moved.threads += 1
        await super().shutdown_default_executor(*args)
        self._moved.threads -= 1

    def _came_back(self, _: object) -> None:
        self._moved.threads -= 1
