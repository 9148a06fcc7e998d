"""Waiting for a condition that nothing announces; the limit only ends a test that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from tests.support.processes import HANG

T = TypeVar("T")

#: Seconds between two looks, the first and at most: to ask of all processes takes a processor.
_PAUSE, _LONGEST = 0.01, 0.1
#: Of processor time: a hundred times what the slowest read in a test takes.
_ENDLESS = 60.0


def until(predicate: Callable[[], T], what: str, limit: float = HANG) -> T:
    """Ask until the answer is true, and return it. Where there is an event, wait for that instead.

    Raises:
        AssertionError: Not within ``limit`` seconds; the message says ``what`` was waited for.
    """
    end, pause = time.monotonic() + limit, _PAUSE
    while not (found := predicate()):
        assert time.monotonic() < end, f"waited {limit:g} s for {what}"
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST)
    return found


async def auntil(predicate: Callable[[], T], what: str, limit: float = HANG) -> T:
    """`until`, while the event loop goes on.

    Raises:
        AssertionError: As `until`.
    """
    end = time.monotonic() + limit
    while not (found := predicate()):
        assert time.monotonic() < end, f"waited {limit:g} s for {what}"
        await asyncio.sleep(_PAUSE)
    return found


@contextlib.contextmanager
def endless_ends() -> Iterator[None]:
    """Fail where what is inside computes without an end; it judges no duration."""

    def late(*_: Any) -> None:
        pytest.fail(f"no end after {_ENDLESS:g} s of processor time")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, _ENDLESS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
