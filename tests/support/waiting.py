"""Waiting for a condition that nothing announces; the limit only ends a test that hangs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from tests.support.processes import HANG

T = TypeVar("T")

_PAUSE = 0.01


def until(predicate: Callable[[], T], what: str, limit: float = HANG) -> T:
    """Ask until the answer is true, and return it. Where there is an event, wait for that instead.

    Raises:
        AssertionError: Not within ``limit`` seconds; the message says ``what`` was waited for.
    """
    end = time.monotonic() + limit
    while not (found := predicate()):
        _check(end, what, limit)
        time.sleep(_PAUSE)
    return found


async def auntil(predicate: Callable[[], T], what: str, limit: float = HANG) -> T:
    """`until`, while the event loop goes on.

    Raises:
        AssertionError: As `until`.
    """
    end = time.monotonic() + limit
    while not (found := predicate()):
        _check(end, what, limit)
        await asyncio.sleep(_PAUSE)
    return found


def _check(end: float, what: str, limit: float) -> None:
    if time.monotonic() > end:
        raise AssertionError(f"waited {limit:g} s for {what}")
