"""Threads and the garbage collector of this process: waits for a thread, delays collections."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    """Run a function as `asyncio.to_thread` does; a cancelled caller still waits for its end.

    The wait prevents that a file which the thread uses is closed too early.
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
    """Delay the first collection until so many objects exist; later ones come as usual."""
    gc.callbacks.append(_collect_as_usual)
    gc.set_threshold(objects)


def _collect_as_usual(phase: str, _: dict[str, int]) -> None:
    """Restore the usual thresholds after the first collection; only a server runs so long."""
    if phase == "stop":
        gc.callbacks.remove(_collect_as_usual)
        gc.set_threshold(*USUAL_THRESHOLDS)
