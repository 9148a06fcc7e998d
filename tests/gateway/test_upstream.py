"""What the gateway asks engines for itself, and a machine that vanishes without a farewell."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.support.gateway import CHAT, call, chat, plan_for
from tests.support.waiting import HANG, auntil, until
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http.refusals import UNREACHED
from turbofit.gateway.routing.engines import RoutedEngine
from turbofit.gateway.server import make_gateway
from turbofit.gateway.upstream import Unreachable, Upstream, engine_socket


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
    ("error", "ended"),
    [
        (failed(errno.ECONNREFUSED), True),
        (failed(errno.ECONNRESET), True),  # it ended before it accepted
        (failed(errno.ETIMEDOUT), False),
        (failed(errno.EHOSTUNREACH), False),
        (failed(errno.EMFILE), False),
        (failed(errno.EADDRNOTAVAIL), False),
        (socket.gaierror(socket.EAI_AGAIN, "try again"), False),
    ],
)
async def test_what_a_connection_that_was_not_made_says_of_the_engine(
    error: OSError, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connect(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(aiohttp.connector.aiohappyeyeballs, "start_connection", connect)
    upstream = Upstream()
    with pytest.raises(Unreachable) as caught:
        await upstream.open(RoutedEngine(0, "http://127.0.0.1:9"), "GET", "/", None, {})
    await upstream.close()
    assert caught.value.ended is ended


@pytest.mark.parametrize(("reason", "ended"), [("busy", False), ("engine_unavailable", True)])
def test_another_turbofit_that_is_busy_has_not_ended(reason: str, ended: bool) -> None:
    async def busy(request: web.Request) -> web.Response:
        return web.Response(status=503, headers={UNREACHED: reason})

    async def main() -> Unreachable:
        app = web.Application()
        app.router.add_get("/", busy)
        async with TestServer(app) as server:
            upstream = Upstream()
            with pytest.raises(Unreachable) as caught:
                await upstream.open(RoutedEngine(0, str(server.make_url(""))), "GET", "/", None, {})
            await upstream.close()
            return caught.value

    assert asyncio.run(main()).ended is ended


linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's options")
BODY = b'{"choices":[{}]}'
#: An engine in a namespace of its own, which has nothing but Python there; it never answers.
SILENT = """
import asyncio
async def one(reader, writer):
    while await reader.read(1 << 16):
        print("read", flush=True)
async def main():
    server = await asyncio.start_server(one, "10.213.77.2", 8000)
    print("ready", flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


async def whole(request: web.Request) -> web.Response:
    return web.Response(body=BODY)


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


@linux
async def test_aiohttp_connects_with_them() -> None:
    app = web.Application()
    app.router.add_get("/x", whole)
    async with TestServer(app) as server:
        upstream = Upstream()
        engine = RoutedEngine(0, str(server.make_url("")))
        response = await upstream.open(engine, "GET", "/x", None, {})
        await response.read()
        (pooled,) = upstream._session.connector._conns.values()
        read = options(pooled[0][0].transport.get_extra_info("socket"))
        await upstream.close()
    assert read == (1, 2, 1, 3, 0)


def acknowledged(upstream: Upstream) -> bool:
    """Whether the one request under way has arrived: nothing of it is sent again and again."""
    (protocol,) = upstream._session.connector._acquired
    under_way = protocol.transport.get_extra_info("socket")
    unsent = fcntl.ioctl(under_way.fileno(), termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(unsent, sys.byteorder) == 0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def namespace():
    """A network namespace behind a pair of virtual cards: its name, and that of the far card."""
    name = f"tf{os.getpid()}"
    near, far = f"{name}a", f"{name}b"
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("needs ip netns")
    try:
        ip("netns", "add", name)
        ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        ip("addr", "add", "10.213.77.1/24", "dev", near)
        ip("link", "set", near, "up")
        ip("-n", name, "addr", "add", "10.213.77.2/24", "dev", far)
        ip("-n", name, "link", "set", far, "up")
    except (subprocess.CalledProcessError, OSError):
        _remove(name, near)
        pytest.skip("network namespaces cannot be made here")
    state = Path(f"/sys/class/net/{near}/operstate")
    until(lambda: state.read_text() == "up\n", "the cards to carry something")
    yield name, far
    _remove(name, near)


def _remove(name: str, near: str) -> None:
    # The card first: sockets that still end keep a namespace, and with it the route there.
    for words in (("link", "del", near), ("netns", "del", name)):
        with suppress(subprocess.CalledProcessError, OSError):
            ip(*words)


@linux
def test_a_request_that_waits_there_is_told_soon(namespace) -> None:
    name, far = namespace
    command = ["ip", "netns", "exec", name, sys.executable, "-c", SILENT]

    async def run():
        app = web.Application()
        app.router.add_post(CHAT, whole)
        server = TestServer(app)
        await server.start_server()
        near = str(server.make_url("")).rstrip("/")
        silent = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert await asyncio.wait_for(silent.stdout.readline(), HANG) == b"ready\n"
        gateway = make_gateway(plan_for(), ["http://10.213.77.2:8000", near], GatewayConfig())
        gateway.engines[0].share = 2.0
        try:
            pending = asyncio.ensure_future(call(gateway, body=chat()))
            assert await asyncio.wait_for(silent.stdout.readline(), HANG) == b"read\n"
            assert [engine.outstanding for engine in gateway.engines] == [1, 0]
            await auntil(lambda: acknowledged(gateway._upstream), "the request to arrive")
            ip("-n", name, "link", "set", far, "down")
            # Without the options it would wait as long as it takes.
            return await asyncio.wait_for(pending, HANG), [engine.up for engine in gateway.engines]
        finally:
            silent.kill()
            await silent.wait()
            await gateway.shutdown()
            await server.close()

    reply, up = asyncio.run(run())
    assert (reply.status, reply.json["error"]["code"]) == (503, "engine_died")
    assert up == [False, True]
