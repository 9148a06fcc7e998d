"""What the gateway asks engines for itself."""

from __future__ import annotations

import asyncio
import errno
import os
import socket

import pytest

pytest.importorskip("aiohttp")

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

from turbofit.gateway.http.refusals import UNREACHED
from turbofit.gateway.routing.engines import RoutedEngine
from turbofit.gateway.upstream import Unreachable, Upstream


async def test_an_engine_that_takes_a_request_and_says_nothing_costs_a_page() -> None:
    """Its HTTP server is stuck: the page would hold up whoever judges the engine by it."""
    heard = asyncio.Event()

    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.set()
        await asyncio.Event().wait()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    upstream = Upstream()
    page = await upstream.page(RoutedEngine(0, f"http://127.0.0.1:{port}"), "/metrics", 0.2)
    await upstream.close()
    server.close()
    assert page == ""
    assert heard.is_set()


def failed(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("error", "vanished", "ended"),
    [
        (failed(errno.ECONNREFUSED), False, True),
        (failed(errno.ECONNRESET), False, True),  # it ended before it accepted
        (failed(errno.ETIMEDOUT), True, False),
        (failed(errno.EHOSTUNREACH), True, False),
        (failed(errno.EMFILE), False, False),
        (failed(errno.EADDRNOTAVAIL), False, False),
        (socket.gaierror(socket.EAI_AGAIN, "try again"), False, False),
    ],
)
async def test_what_a_connection_that_was_not_made_says_of_the_engine(
    error: OSError, vanished: bool, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connect(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(aiohttp.connector.aiohappyeyeballs, "start_connection", connect)
    upstream = Upstream()
    with pytest.raises(Unreachable) as told:
        await upstream.open(RoutedEngine(0, "http://127.0.0.1:9"), "GET", "/", None, {})
    await upstream.close()
    told = told.value
    assert (told.vanished, told.ended) == (vanished, ended)


@pytest.mark.parametrize(("reason", "ended"), [("busy", False), ("engine_unavailable", True)])
def test_another_turbofit_that_is_busy_has_not_ended(reason: str, ended: bool) -> None:
    async def busy(request: web.Request) -> web.Response:
        return web.Response(status=503, headers={UNREACHED: reason})

    async def main() -> Unreachable:
        app = web.Application()
        app.router.add_get("/", busy)
        async with TestServer(app) as server:
            upstream = Upstream()
            with pytest.raises(Unreachable) as told:
                await upstream.open(RoutedEngine(0, str(server.make_url(""))), "GET", "/", None, {})
            await upstream.close()
            return told.value

    assert asyncio.run(main()).ended is ended
