"""Coroutines that end together, and threads that are always waited for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

__all__ = ["in_thread", "run_together"]

T = TypeVar("T")


async def run_together(
    work: Iterable[Coroutine[Any, Any, None]], beside: Iterable[Coroutine[Any, Any, None]]
) -> None:
    """Wait for all of the work, or for the first error; then nothing of either runs any more.

    Args:
        work: what is to be done.
        beside: what goes on meanwhile, and has no end.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    others = [asyncio.ensure_future(one) for one in beside]
    left = {*tasks, *others}
    try:
        while left & set(tasks):
            done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                one.result()
    finally:
        for one in (*tasks, *others):
            one.cancel()
        await asyncio.gather(*tasks, *others, return_exceptions=True)


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
