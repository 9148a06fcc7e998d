"""Delays Python's garbage collector at the start, and runs functions in threads."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    """Run a function as `asyncio.to_thread` does, but wait for its end also when cancelled.

    So the caller closes no file that the thread still uses.
    """
    import asyncio  # planning needs none

    task = asyncio.ensure_future(asyncio.to_thread(function, *arguments, **keywords))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise


USUAL_THRESHOLDS: Final = gc.get_threshold()


def collect_after(objects: int) -> None:
    """Delay the first collection until ``objects`` exist; later collections come as usual."""
    gc.callbacks.append(_collect_as_usual)
    gc.set_threshold(objects)


def _collect_as_usual(phase: str, _: dict[str, int]) -> None:
    """Restore the usual thresholds after the first collection, which short commands never reach."""
    if phase == "stop":
        gc.callbacks.remove(_collect_as_usual)
        gc.set_threshold(*USUAL_THRESHOLDS)
