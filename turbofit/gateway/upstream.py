"""The HTTP client of engines: sends requests, returns answers, and tells what failed."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import msgspec

from turbofit.core.errors import UsageError
from turbofit.gateway.http.connections import is_loopback
from turbofit.gateway.http.refusals import BUSY, UNREACHED
from turbofit.gateway.http.routes import first_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiohttp.connector import Connection

    from turbofit.gateway.routing.engines import RoutedEngine

_CONNECT_SECONDS: Final = 5.0
#: Seconds that an idle connection is kept: less than uvicorn's 5 s, so that no request uses a
#: connection that the engine is closing.
_KEEP_ALIVE: Final = 3.0
#: Seconds of silence after which an answer is given up, even if its engine answers others.
_SILENCE: Final = 3600.0
_READ_BUFFER: Final = 1 << 18
#: The most bytes of a page of an engine or a node about itself.
_LARGEST_PAGE: Final = 4 << 20
#: Seconds within which an engine must send a page about its own state.
HEALTH_SECONDS: Final = 10.0
#: TCP keep-alive: an idle connection is tested after 2 s, then once a second, three times.
_TCP_KEEP_ALIVE: Final = (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3))
_UNHEARD_MS: Final = 5000


class Unreachable(Exception):  # noqa: N818
    """The engine did not receive the request.

    ``ended``: nothing listens at the address, or a gateway there has no running engine.
    """

    def __init__(self, message: str, *, ended: bool = False) -> None:
        super().__init__(message)
        self.ended = ended


class Died(Exception):  # noqa: N818
    """The engine ended the connection before its answer was complete."""


class Upstream:
    """A client of all engines, which sends each engine its own API key.

    ``serial``: the engines answer one request after another. A probe for a token would then wait
    for all running requests; so an engine's health page is read instead, which tells whether tokens
    still come.
    """

    def __init__(self, *, serial: bool = False) -> None:
        self._serial = serial
        self._session: aiohttp.ClientSession | None = None

    async def open(
        self,
        engine: RoutedEngine,
        method: str,
        path: str,
        body: bytes | None,
        headers: dict[str, str],
    ) -> aiohttp.ClientResponse:
        """Send a request; return the response as soon as its headers have come.

        Raises `Unreachable` if the engine did not receive the request, `Died` if the engine broke
        it off.
        """
        if engine.key:
            headers = {**headers, "Authorization": f"Bearer {engine.key}"}
        try:
            # The body goes in one piece; aiohttp prefers a file for megabytes, which is slower.
            response = await self._opened().request(
                method, engine.url + path, data=body, headers=headers, allow_redirects=False
            )
        except aiohttp.ClientConnectorError as exc:
            # A connection that waits for acceptance when the engine ends is reset, not refused.
            raise Unreachable(str(exc), ended=isinstance(exc.os_error, ConnectionError)) from None
        except aiohttp.ConnectionTimeoutError as exc:
            raise Unreachable(str(exc)) from None
        except (aiohttp.ClientError, OSError) as exc:
            raise Died(str(exc)) from exc
        if response.status == 401:
            response.close()
            raise Unreachable("it does not take the key")  # the engine's fault, not the client's
        unreached = response.headers.get(UNREACHED)
        if unreached is not None:
            response.close()
            raise Unreachable(f"no engine had it: {unreached}", ended=unreached != BUSY)
        return response

    async def probe(self, engine: RoutedEngine) -> bool:
        """Ask an engine for one token; return whether the engine answered with success.

        With ``serial``, ask for the engine's health page instead.
        """
        if self._serial:
            return bool(await self.page(engine, "/health", HEALTH_SECONDS))
        try:
            if engine.model is None:
                engine.model = first_model(await self.page(engine, "/v1/models", HEALTH_SECONDS))
            if engine.model is None:
                return False
            question = {
                "model": engine.model,
                "messages": [{"role": "user", "content": "1"}],
                "max_tokens": 1,
                "temperature": 0,
            }
            body = msgspec.json.encode(question)
            headers = {"Content-Type": "application/json"}
            response = await self.open(engine, "POST", "/v1/chat/completions", body, headers)
            async with response:
                await response.read()
        except (Unreachable, Died, aiohttp.ClientError, OSError):
            return False
        if response.status == 404:
            # Another model is served there now.
            engine.model = None
        return response.status == 200

    async def page(self, engine: RoutedEngine, path: str, seconds: float) -> str:
        """Return a page of an engine as text; empty if it fails, is too large or comes too late."""
        try:
            return await asyncio.wait_for(self._page(engine, path), seconds)
        except (asyncio.TimeoutError, Unreachable, Died, aiohttp.ClientError, OSError, ValueError):
            return ""  # before Python 3.11 a timeout of asyncio is no OSError

    async def _page(self, engine: RoutedEngine, path: str) -> str:
        async with await self.open(engine, "GET", path, None, {}) as response:
            data = bytearray()
            async for chunk in response.content.iter_any():
                data += chunk
                if response.status != 200 or len(data) > _LARGEST_PAGE:
                    return ""  # unread bytes close the connection
            return data.decode() if response.status == 200 else ""

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            # No limit on connections: admission decides how many there are.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0,
                    keepalive_timeout=_KEEP_ALIVE,
                    socket_factory=engine_socket,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE
                ),
                skip_auto_headers=("User-Agent", "Accept-Encoding"),
                auto_decompress=False,
                trust_env=False,
                read_bufsize=_READ_BUFFER,
                response_class=_Answer,
            )
        return self._session


class _Answer(aiohttp.ClientResponse):
    """An engine's response; after a server error its connection is not used again.

    LMDeploy's server may close such a connection silently. The next request on the connection would
    then fail as if the engine had died.
    """

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        protocol = connection.protocol
        answer = await super().start(connection)
        if self.status >= 500 and protocol is not None:
            protocol.force_close()  # once the answer is whole
            if self.connection is None:  # it is
                protocol.close()
        return answer


def refuse_no_url(urls: Sequence[str], whose: str, example: str) -> None:
    """Refuse a text that is no URL; the message says that it is no address of ``whose``.

    Raises:
        UsageError: a text is no URL; the hint shows the ``example``.
    """
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{url!r} is no address of {whose}", hint=f"write {example}")


def engine_socket(address: Sequence[Any]) -> socket.socket:
    """Make a socket for aiohttp to connect to an engine at an address of `socket.getaddrinfo`.

    A machine that loses power closes no connection, so the socket tests the connection by TCP
    keep-alive, which the engine's kernel answers however busy the engine is. On another host, an
    engine is also given up if its kernel's buffer is full and the engine reads nothing of a body
    for 5 s.
    """
    family, kind, proto, _, where = address
    connecting = socket.socket(family, kind, proto)
    connecting.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = [*_TCP_KEEP_ALIVE]
    if not is_loopback(where[0]):
        options.append(("TCP_USER_TIMEOUT", _UNHEARD_MS))
    for name, value in options:
        if hasattr(socket, name):
            connecting.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connecting
