"""Coroutines that end together."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable
    from typing import Any

__all__ = ["run_together"]


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
