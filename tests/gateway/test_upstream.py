"""What the gateway asks engines for itself, and a machine that vanishes without a farewell."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from turbofit.gateway.http.refusals import UNREACHED
from turbofit.gateway.routing.engines import RoutedEngine
from turbofit.gateway.upstream import Unreachable, Upstream, engine_socket


async def test_an_engine_that_takes_a_request_and_says_nothing_costs_a_page() -> None:
    """Its HTTP server is stuck: the page would hold up whoever judges the engine by it."""
    heard = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.set()
        await reader.read()  # until the client goes; a server ends after its connections
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server, opened() as upstream:
        engine = RoutedEngine(0, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        assert await upstream.page(engine, "/metrics", 0.2) == ""
    assert heard.is_set()


@asynccontextmanager
async def opened() -> AsyncIterator[Upstream]:
    upstream = Upstream()
    yield upstream
    await upstream.close()


@asynccontextmanager
async def answering(handler: Any) -> AsyncIterator[tuple[Upstream, RoutedEngine]]:
    """A server that answers GET / so, as an engine."""
    app = web.Application()
    app.router.add_get("/", handler)
    async with TestServer(app) as server, opened() as upstream:
        yield upstream, RoutedEngine(0, str(server.make_url("")).rstrip("/"))


async def unreachable(upstream: Upstream, engine: RoutedEngine) -> bool:
    """Whether an engine that is not reached has ended."""
    with pytest.raises(Unreachable) as caught:
        await upstream.open(engine, "GET", "/", None, {})
    return caught.value.ended


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (ConnectionRefusedError(), True),
        (ConnectionResetError(), True),  # it ended before it accepted
        (OSError(errno.ETIMEDOUT, ""), False),
        (OSError(errno.EHOSTUNREACH, ""), False),
        (OSError(errno.EMFILE, ""), False),
        (socket.gaierror(socket.EAI_AGAIN, "try again"), False),
    ],
)
async def test_what_a_connection_that_was_not_made_says_of_the_engine(
    error: OSError, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connect(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(aiohttp.connector.aiohappyeyeballs, "start_connection", connect)
    async with opened() as upstream:
        assert await unreachable(upstream, RoutedEngine(0, "http://127.0.0.1:9")) is ended


@pytest.mark.parametrize(("reason", "ended"), [("busy", False), ("engine_unavailable", True)])
def test_another_turbofit_that_is_busy_has_not_ended(reason: str, ended: bool) -> None:
    async def busy(request: web.Request) -> web.Response:
        return web.Response(status=503, headers={UNREACHED: reason})

    async def main() -> bool:
        async with answering(busy) as given:
            return await unreachable(*given)

    assert asyncio.run(main()) is ended


linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's options")


async def test_a_connection_that_brought_an_error_is_not_used_again() -> None:
    """LMDeploy's server may close it without a word, which is no death of its engine."""
    connections = []
    error = b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 5\r\n\r\n"
    fine = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        await reader.readuntil(b"\r\n\r\n{}")
        if len(connections) == 1:
            writer.write(error + b"error")
        elif len(connections) == 2:
            writer.write(error)
            await writer.drain()
            await went_on.wait()  # the head comes alone
            writer.write(b"error")
        else:
            writer.write(fine)
        await reader.read(1)  # another request or the end: both end it
        writer.close()

    went_on = asyncio.Event()
    async with await asyncio.start_server(once, "127.0.0.1", 0) as server, opened() as upstream:
        engine = RoutedEngine(0, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        seen = []
        for _ in range(3):
            async with await upstream.open(engine, "POST", "/", b"{}", {}) as answer:
                went_on.set() if seen else None
                seen.append((answer.status, await answer.read()))
    assert seen == [(500, b"error"), (500, b"error"), (200, b"{}")]
    assert len(connections) == 3


def options(socket_: socket.socket) -> tuple[int, ...]:
    read = socket_.getsockopt
    names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
    numbers = [read(socket.IPPROTO_TCP, getattr(socket, name)) for name in names]
    return (int(bool(read(socket.SOL_SOCKET, socket.SO_KEEPALIVE))), *numbers)


@linux
def test_the_options_are_on_every_connection_to_an_engine() -> None:
    kind = socket.SOCK_STREAM, socket.IPPROTO_TCP, ""
    for family, where, patience in (
        (socket.AF_INET, ("192.0.2.1", 1), 5000), (socket.AF_INET, ("127.0.0.1", 1), 0),
        (socket.AF_INET6, ("2001:db8::1", 1, 0, 0), 5000), (socket.AF_INET6, ("::1", 1, 0, 0), 0),
    ):  # fmt: skip
        try:
            connecting = engine_socket((family, *kind, where))
        except OSError:
            assert family == socket.AF_INET6  # a machine without it
            continue
        with connecting:
            assert options(connecting) == (1, 2, 1, 3, patience)
