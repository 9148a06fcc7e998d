"""Hears from engines when the first token of a request is there, also of answers in one piece.

An engine that turbofit starts has a page of lines: the names of requests whose first token came,
each with the number of its prompt's tokens (`serving.engine.first_tokens`). Other engines have no
such page: then only streams show their first tokens. If a line is lost, other requests wait longer,
but no limit is exceeded: the units of a request count until its first token is known, or until its
end.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

import aiohttp

from turbofit.core.messages import FIRST_TOKENS
from turbofit.gateway.routing.engines import RoutedEngine
from turbofit.gateway.upstream import Died, Unreachable, Upstream

#: Seconds until an engine is asked for its page again: after it ended, and after it had no page.
_AGAIN: Final = 1.0
_NO_PAGE: Final = 30.0


class FirstTokens:
    """The names of requests whose first tokens are awaited, and the open pages of engines.

    >>> name = first_tokens.expect(copies, begun)  # sent to the engine in the header EXCHANGE
    >>> first_tokens.forget(name)  # at the end of the exchange
    """

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        # No other gateway before the same engine has these names.
        self._prefix, self._numbers = secrets.token_hex(8), itertools.count()
        #: For each name: the copies without a first token, the most tokens of a copy's prompt so
        #: far, and the function to call at the last first token.
        self._awaited: dict[str, tuple[int, int, Callable[[int], None]]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, engines: Iterable[RoutedEngine]) -> None:
        self._tasks = [asyncio.ensure_future(self._listen(engine)) for engine in engines]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def expect(self, copies: int, begun: Callable[[int], None]) -> str:
        """Return a new name for a request.

        When all copies have a token, ``begun`` is called with the tokens of the longest prompt.
        """
        name = f"{self._prefix}-{next(self._numbers)}"
        self._awaited[name] = copies, 0, begun
        return name

    def forget(self, name: str) -> None:
        self._awaited.pop(name, None)

    def _hear(self, line: str) -> None:
        """Count a first token; an unknown name is that of a request that has ended."""
        name, _, tokens = line.partition(" ")
        if name not in self._awaited or not tokens.isdecimal():
            return
        left, prompt, begun = self._awaited.pop(name)
        prompt = max(prompt, int(tokens))
        if left > 1:
            self._awaited[name] = left - 1, prompt, begun
        else:
            begun(prompt)

    async def _listen(self, engine: RoutedEngine) -> None:
        """Read an engine's page, and ask for it again whenever it ends."""
        while True:
            pause = _AGAIN
            with suppress(Unreachable, Died, aiohttp.ClientError, OSError, ValueError):
                if not await self._read(engine):
                    pause = _NO_PAGE
            engine.tells_first_tokens = False
            await asyncio.sleep(pause)

    async def _read(self, engine: RoutedEngine) -> bool:
        """Read an engine's page until the page ends; return False if the engine has no page."""
        async with await self._upstream.open(engine, "GET", FIRST_TOKENS, None, {}) as response:
            if response.status != 200:
                return False
            engine.tells_first_tokens = True
            while line := await response.content.readline():
                self._hear(line.decode().strip())
        return True
