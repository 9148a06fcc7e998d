"""What ASGI asks of a gateway beside its HTTP requests."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]

__all__ = ["AsgiApp", "tell_bug"]


class AsgiApp(ABC):
    """An ASGI app of HTTP requests alone. Subclasses provide: `_http`, `startup`, `shutdown`."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            with suppress(asyncio.CancelledError):  # at the server's end, which has told its client
                await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    @abstractmethod
    async def startup(self) -> None:
        """The server begins."""

    @abstractmethod
    async def shutdown(self) -> None:
        """The server has ended."""

    @abstractmethod
    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.startup()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.shutdown()
                await send({"type": "lifespan.shutdown.complete"})
                return


def tell_bug(exc: BaseException) -> None:
    """Hand a bug of turbofit to the loop's handler, which shows a traceback."""
    loop = asyncio.get_running_loop()
    loop.call_exception_handler({"message": "a bug in turbofit's gateway", "exception": exc})
