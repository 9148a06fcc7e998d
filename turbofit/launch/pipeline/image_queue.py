"""In-process admission: image requests of a pipeline that may meet in one forward."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

__all__ = ["queued"]


def queued(
    generate: Callable[..., AsyncIterator[Any]], most: int, *, to_end: bool = False
) -> Callable[..., AsyncIterator[Any]]:
    """``AsyncEngine.generate`` with at most ``most`` image requests before their first answer.

    Each counts as a request at the plan's limit, so over: smaller images could share a forward.
    A request that does not show whether it holds images waits too.

    Args:
        generate: LMDeploy's, of one engine; its first argument is the preprocessed request.
        most: requests, at least 1.
        to_end: each counts until its last answer, see ``Bounds.gate_to_end``.
    """
    room = asyncio.Semaphore(most)

    async def in_turn(request: Any, *arguments: Any, **keywords: Any) -> AsyncIterator[Any]:
        inputs = getattr(request, "inputs", None)
        waits = inputs is None or bool(inputs.get("multimodal"))
        if waits:
            await room.acquire()
        try:
            async for item in generate(request, *arguments, **keywords):
                if waits and not to_end:
                    room.release()
                    waits = False
                yield item
        finally:
            if waits:
                room.release()

    return in_turn
