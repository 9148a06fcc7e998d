"""The HTTP client of engines: sends requests, returns answers, and raises typed errors."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Any, Final

import aiohttp
import msgspec
from aiohttp.connector import Connection

from turbofit.core.errors import UsageError
from turbofit.gateway.http.connections import is_loopback
from turbofit.gateway.http.refusals import BUSY, UNREACHED
from turbofit.gateway.http.routes import first_model
from turbofit.gateway.routing.engines import RoutedEngine

_CONNECT_SECONDS: Final = 5.0
#: Seconds for which an idle connection is kept. uvicorn keeps a connection for 5 s; a request on a
#: connection that the engine closes would fail.
_KEEP_ALIVE: Final = 3.0
#: Seconds of silence after which a request is given up, even if the engine answers other requests.
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

    ``ended``: nothing listens at the address, or the gateway at the address has no running engine.
    """

    def __init__(self, message: str, *, ended: bool = False) -> None:
        super().__init__(message)
        self.ended = ended


class Died(Exception):  # noqa: N818
    """The engine ended the connection before its answer was complete."""


class Upstream:
    """A client of all engines, which sends each engine its own API key.

    ``serial``: the engines answer one request after another. A probe for a token would then wait
    for all running requests. So the probe reads the engine's health page, which tells whether
    tokens still come.
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

        Raises:
            Unreachable: the engine did not receive the request.
            Died: the engine broke the connection off.
        """
        if engine.key:
            headers = {**headers, "Authorization": f"Bearer {engine.key}"}
        try:
            # The body goes in one piece: a file, which aiohttp recommends, would be slower.
            response = await self._opened().request(
                method, engine.url + path, data=body, headers=headers, allow_redirects=False
            )
        except aiohttp.ClientConnectorError as exc:
            # Nothing listens: the connection is refused, or reset if the engine ended just then.
            raise Unreachable(str(exc), ended=isinstance(exc.os_error, ConnectionError)) from None
        except aiohttp.ConnectionTimeoutError as exc:
            raise Unreachable(str(exc)) from None
        except (aiohttp.ClientError, OSError) as exc:
            raise Died(str(exc)) from exc
        if response.status == 401:
            response.close()
            raise Unreachable("the engine refuses the gateway's key")
        unreached = response.headers.get(UNREACHED)
        if unreached is not None:
            response.close()
            raise Unreachable(
                f"no engine received the request: {unreached}", ended=unreached != BUSY
            )
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
            # The engine serves another model since its last start.
            engine.model = None
        return response.status == 200

    async def page(self, engine: RoutedEngine, path: str, seconds: float) -> str:
        """Return a page of an engine as text; empty if the page fails, is too large, or is late."""
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
            # `Admission` limits the requests, so connections need no limit.
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

    LMDeploy's server may close such a connection silently. Then the next request on the connection
    fails, as after the death of the engine.
    """

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        protocol = connection.protocol
        answer = await super().start(connection)
        if self.status >= 500 and protocol is not None:
            protocol.force_close()  # takes effect at the end of the answer
            if self.connection is None:  # the answer has ended already
                protocol.close()
        return answer


def refuse_no_url(urls: Sequence[str], whose: str, example: str) -> None:
    """Refuse a text that is no URL. ``whose`` names, in the message, the owner of the address.

    Raises:
        UsageError: a text is no URL; the hint shows the ``example``.
    """
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{url!r} is no address of {whose}", hint=f"write {example}")


def engine_socket(address: Sequence[Any]) -> socket.socket:
    """Make a socket for aiohttp to connect to an engine at an address of `socket.getaddrinfo`.

    A machine that loses power closes no connection. So the socket tests the connection by TCP
    keep-alive, which the engine's kernel answers even if the engine is busy. The socket also gives
    up an engine on another host that reads nothing of a body for 5 s.
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
