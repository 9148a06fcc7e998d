"""Makes what LMDeploy's server does before a request reaches the engine as slow as the cards.

On pretend GPUs that are N times slower than life, everything that a client measures is divided by
N. Pictures, tokenizer and HTTP take this host as long as ever, so a request waits here N - 1 times
as long as they took; the division then leaves them whole.
"""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar
from typing import Any, Final

from turbofit.rehearsal.pretend.clock import ClockFile

#: When the server took the request of this task, by `time.monotonic`.
_TAKEN: Final[ContextVar[float | None]] = ContextVar("taken", default=None)


def slow_down(pool: Any, app: Any, clock: ClockFile) -> None:
    """Make each request wait before it takes one of the engine's handles.

    ``pool`` is LMDeploy's class `RequestHandlePool`, ``app`` the class of its ASGI app. A request
    that finds no free handle waits for the cards, which are slow themselves, so this counts only
    what passed before.
    """
    get, serve = pool.get, app.__call__

    async def call(self: Any, scope: Any, receive: Any, send: Any) -> None:
        _TAKEN.set(time.monotonic())
        await serve(self, scope, receive, send)

    async def get_later(self: Any) -> Any:
        taken, slower = _TAKEN.get(), clock.read().factor - 1
        if taken is not None and slower > 0:
            await asyncio.sleep(slower * (time.monotonic() - taken))
        return await get(self)

    app.__call__, pool.get = call, get_later
