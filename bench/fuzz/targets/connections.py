"""A connection's bytes, from HTTP to an engine that records: the gateway as strangers reach it.

The input comes in the pieces between two ``|~|``; a piece that is empty ends the connection.
"""

from __future__ import annotations

import asyncio
import json
from copy import copy
from functools import cache
from typing import Any, Final

from uvicorn import Config
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.server import ServerState

from bench.common.gateway import chat, gateway, image_part
from turbofit.gateway.http.protocol import LimitedProtocol, limited_protocol
from turbofit.gateway.server import _uvicorn

WORDS: Final = (
    "|~|", "POST ", "GET ", "OPTIONS ", "HEAD ", "/v1/chat/completions", "/v1/messages",
    "/v1/models",
    "/health", "/metrics", "/%2e%2e/", "//", "?", " HTTP/1.1\r\n", " HTTP/1.0\r\n", "Host: a\r\n",
    "Content-Type: application/json\r\n", "Content-Length: ", "Transfer-Encoding: chunked\r\n",
    "Expect: 100-continue\r\n", "Connection: close\r\n", "Connection: upgrade\r\nUpgrade: h2c\r\n",
    "Origin: http://a\r\n", "Authorization: Bearer k\r\n", "x-api-key: k\r\n",
    "X-Request-Id: 1\r\n",
    "X-Forwarded-For: 10.0.0.1\r\n", "anthropic-version: 2023-06-01\r\n", "\r\n\r\n", "0\r\n\r\n",
    '{"messages":"hi"}', "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)  # fmt: skip
_SEPARATOR: Final = b"|~|"
_KEYS, _PROXIES = ("k",), ("10.0.0.9",)
_TURNS: Final = 40


class _Wire(asyncio.Transport):
    """A transport into nothing, which remembers what was written."""

    def __init__(self) -> None:
        super().__init__({"peername": ("10.0.0.9", 1), "sockname": ("10.0.0.1", 2)})
        self.written = bytearray()
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def one(data: bytes) -> None:
    """Nothing but answers below 500 and 503, and nothing is left when the connection ended."""
    found = _loop().run_until_complete(_spoken(data))
    if found:
        raise found[0]


async def _spoken(data: bytes) -> list[BaseException]:
    loop = asyncio.get_running_loop()
    bugs: list[BaseException] = []
    loop.set_exception_handler(lambda _, context: bugs.append(_error(context)))
    app, _ = gateway(api_keys=_KEYS, trusted_proxies=_PROXIES)
    others = asyncio.all_tasks()
    protocol, wire = _connected(app, loop)
    for piece in data.split(_SEPARATOR):
        if not piece or wire.closed:
            break
        protocol.data_received(piece)
        await _settled()
    await _settled()
    protocol.connection_lost(None)
    await _settled()
    for line in bytes(wire.written).split(b"\r\n"):
        if line.startswith(b"HTTP/1.1 5"):
            assert line[9:12] == b"503", line
    left = asyncio.all_tasks() - others
    for task in left:
        task.cancel()
    assert not left, left
    assert app._bodies.in_memory == 0
    assert all(engine.units == engine.host_bytes == 0 for engine in app.engines)
    assert not len(app.connections)
    return bugs


def _connected(app: Any, loop: asyncio.AbstractEventLoop) -> tuple[LimitedProtocol, _Wire]:
    kind = limited_protocol(app.config.connection, app.connections)
    config = copy(_config())
    config.loaded_app = ProxyHeadersMiddleware(app, list(app.config.trusted_proxies))
    protocol = kind(config, ServerState(), {}, loop)
    wire = _Wire()
    protocol.connection_made(wire)
    return protocol, wire


@cache
def _config() -> Config:
    """The settings of a gateway's server."""
    app, _ = gateway(trusted_proxies=_PROXIES)
    return _uvicorn(app).config


async def _settled() -> None:
    """Until nobody has anything to do but to wait for more."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)


def _error(context: dict[str, Any]) -> BaseException:
    exc = context.get("exception")
    return exc if isinstance(exc, BaseException) else RuntimeError(str(context.get("message")))


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def seeds() -> list[bytes]:
    """Requests to each route, whole and in pieces."""
    head = b"Host: a\r\nAuthorization: Bearer k\r\n"
    found = [
        b"GET %s HTTP/1.1\r\n%s\r\n" % (path, head)
        for path in (b"/health", b"/metrics", b"/v1/models", b"/sleep", b"/v1/%2e%2e/x", b"*")
    ]
    kind = b"Content-Type: application/json\r\n"
    small = chat(max_tokens=4)
    for path, body in (
        (b"/v1/chat/completions", small),
        (b"/v1/chat/completions", chat(image_part(8, 8))),
        (b"/v1/chat/completions", {**small, "stream": True}),
        (b"/v1/completions", {"model": "m", "prompt": "x"}),
        (b"/v1/messages", {"model": "m", "messages": [{"role": "user", "content": "x"}]}),
        (b"/generate", {"prompt": "x"}),
    ):
        raw = json.dumps(body).encode()
        size = b"Content-Length: %d\r\n\r\n" % len(raw)
        found.append(b"POST %s HTTP/1.1\r\n%s%s%s%s" % (path, head, kind, size, raw))
        cut = [raw[: len(raw) // 2], raw[len(raw) // 2 :]]
        line = b"POST %s HTTP/1.1\r\n%s%s" % (path, head, kind)
        found.append(_SEPARATOR.join((line, size, *cut)))
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in cut) + b"0\r\n\r\n"
        found.append(line + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
    found.append(_SEPARATOR.join((found[-1], found[0])))
    found.append(found[-2] + found[0])
    return found
