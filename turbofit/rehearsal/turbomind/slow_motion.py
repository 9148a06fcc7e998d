"""Makes what LMDeploy's server does before a request reaches the engine as slow as the cards.

On pretend GPUs that are N times slower than life, everything that a client measures is divided by
N. Pictures, tokenizer and HTTP take this host as long as ever, so a request waits here N - 1 times
as long as they took; the division then leaves them whole.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, Final

from turbofit.rehearsal.pretend.clock import ClockFile

#: When the server took the request of this task, by `time.monotonic`.
_TAKEN: Final[ContextVar[float | None]] = ContextVar("taken", default=None)


def slow_down(engine: Any, app: Any, clock: ClockFile) -> None:
    """Make each request wait before the engine gets it.

    ``engine`` is LMDeploy's class `AsyncEngine`, ``app`` the class of its ASGI app.
    """
    run, serve = engine.safe_run, app.__call__

    async def call(self: Any, scope: Any, receive: Any, send: Any) -> None:
        _TAKEN.set(time.monotonic())
        await serve(self, scope, receive, send)

    @asynccontextmanager
    async def safe_run(self: Any, handle: Any, session: Any, **given: Any) -> AsyncIterator[Any]:
        taken, slower = _TAKEN.get(), clock.read().factor - 1
        # The engine gets the request when the outputs are asked for. LMDeploy's `safe_run` itself
        # ends the request of a client that leaves during the wait.
        async with run(self, handle, session, **given) as outputs:
            if taken is not None and slower > 0:
                await asyncio.sleep(slower * (time.monotonic() - taken))
            yield outputs

    app.__call__, engine.safe_run = call, safe_run
