"""The way to an engine: bytes arrive as they were, and only from where they may."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.processes import free_port
from tests.waiting import HANG
from turbofit.core.errors import LaunchError
from turbofit.launch.cluster.forward import Forwarder
from turbofit.launch.cluster.tls import client_context, server_context

HOME = "127.0.0.1"


@contextmanager
def echo() -> Iterator[int]:
    """A server that answers with what it got once the client has ended; its port."""
    listener = socket.create_server((HOME, 0))

    def answer(one: socket.socket) -> None:
        with one:
            data = b""
            while chunk := one.recv(1 << 16):
                data += chunk
            one.sendall(data[::-1])

    def run() -> None:
        while True:
            try:
                one, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(one,), daemon=True).start()

    threading.Thread(target=run, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


def through(port: int, data: bytes, tls: ssl.SSLContext | None = None) -> bytes:
    """Send, end the sending, and read to the end."""
    raw = socket.create_connection((HOME, port), timeout=HANG)
    with raw if tls is None else tls.wrap_socket(raw) as one:
        one.sendall(data)
        if isinstance(one, ssl.SSLSocket):
            return one.recv(1 << 16)
        one.shutdown(socket.SHUT_WR)
        got = b""
        while chunk := one.recv(1 << 16):
            got += chunk
        return got


def answered(port: int, tls: ssl.SSLContext | None = None) -> bool:
    """Whether anything comes back; the kernel may tell of the break, or only of the end."""
    try:
        return through(port, b"hello", tls) != b""
    except OSError:
        return False


@pytest.mark.parametrize("size", [1, 70_000, 9 << 20])
def test_all_bytes_arrive_both_ways(size: int) -> None:
    """The first ones too, which come before the engine's end is connected."""
    data = bytes(n % 251 for n in range(size))
    with echo() as port:
        forwarder = Forwarder(HOME, port, [HOME])
        forwarder.start()
        try:
            assert through(forwarder.port, data) == data[::-1]
            assert forwarder.url == f"http://{HOME}:{forwarder.port}"
        finally:
            forwarder.stop()


def test_strangers_are_turned_away_and_counted() -> None:
    """Until they are let in."""
    with echo() as port:
        forwarder = Forwarder(HOME, port, ["192.0.2.77"])
        forwarder.start()
        try:
            assert not answered(forwarder.port)
            assert forwarder.refused == {HOME: 1}
            forwarder.allow([HOME])
            assert answered(forwarder.port)
        finally:
            forwarder.stop()


def test_while_the_engine_does_not_listen_that_is_the_answer() -> None:
    """A gateway could not tell a closed connection from an engine that died of the request."""
    pytest.importorskip("aiohttp")
    from turbofit.gateway.routing.engines import RoutedEngine
    from turbofit.gateway.routing.upstream import Unreachable, Upstream

    forwarder = Forwarder(HOME, free_port(), [HOME])
    forwarder.start()

    async def asked(body: bytes) -> None:
        upstream = Upstream()
        try:
            await upstream.open(RoutedEngine(0, forwarder.url), "POST", "/v1/completions", body, {})
        finally:
            await upstream.close()

    try:
        for size in (1, 70_000, 9 << 20):
            with pytest.raises(Unreachable) as caught:
                asyncio.run(asked(bytes(size)))
            assert not caught.value.vanished
        assert b"503" in through(forwarder.port, b"GET / HTTP/1.1\r\n\r\n")
    finally:
        forwarder.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOME, forwarder.port), timeout=HANG)


def test_an_address_of_another_host_cannot_be_listened_at() -> None:
    """Said with what to do."""
    with pytest.raises(LaunchError, match=r"192\.0\.2\.200 cannot be listened at") as caught:
        Forwarder("192.0.2.200", 1, []).start()
    assert "--node-ip-address" in caught.value.hint


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Ray's variables, with certificates of one authority."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    try:
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out",
                "ca.crt", "-days", "2", "-subj", "/CN=ray")  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no openssl")
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", "node.key", "-out", "node.csr",
            "-subj", "/CN=node")  # fmt: skip
    openssl("x509", "-req", "-in", "node.csr", "-CA", "ca.crt", "-CAkey", "ca.key",
            "-CAcreateserial", "-out", "node.crt", "-days", "2")  # fmt: skip
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(folder / "node.crt"),
        "RAY_TLS_SERVER_KEY": str(folder / "node.key"),
        "RAY_TLS_CA_CERT": str(folder / "ca.crt"),
    }


def test_under_rays_certificates(certificates: dict[str, str]) -> None:
    """Both ends show one; a client without one gets nothing."""
    listener = socket.create_server((HOME, 0))

    def answer() -> None:
        while True:
            one, _ = listener.accept()
            with one:
                one.sendall(one.recv(100).upper())

    threading.Thread(target=answer, daemon=True).start()
    port = listener.getsockname()[1]
    forwarder = Forwarder(HOME, port, [HOME], server_context(certificates))
    forwarder.start()
    try:
        assert forwarder.url.startswith("https://")
        assert through(forwarder.port, b"hello", client_context(certificates)) == b"HELLO"
        nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        nobody.check_hostname, nobody.verify_mode = False, ssl.CERT_NONE
        assert not answered(forwarder.port, nobody)
    finally:
        forwarder.stop()


def test_a_gateway_shows_rays_certificates(certificates: dict[str, str]) -> None:
    """To the engines that it is told of; without them none would ever be up."""
    pytest.importorskip("aiohttp")
    from turbofit.gateway.routing.engines import RoutedEngine
    from turbofit.gateway.routing.upstream import Upstream

    listener = socket.create_server((HOME, 0))

    def answer() -> None:
        while True:
            one, _ = listener.accept()
            with one:
                one.recv(1000)
                one.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    threading.Thread(target=answer, daemon=True).start()
    port = listener.getsockname()[1]
    forwarder = Forwarder(HOME, port, [HOME], server_context(certificates))
    forwarder.start()

    async def asked(tls: ssl.SSLContext | None) -> str:
        upstream = Upstream(tls=tls)
        try:
            return await upstream.page(RoutedEngine(0, forwarder.url), "/health", 5)
        finally:
            await upstream.close()

    try:
        assert asyncio.run(asked(client_context(certificates))) == "ok"
        assert asyncio.run(asked(None)) == ""
    finally:
        forwarder.stop()


def test_without_rays_tls_there_is_none(tmp_path: Path) -> None:
    """And certificates that cannot be read are said."""
    assert server_context({}) is None
    assert client_context({"RAY_USE_TLS": "0"}) is None
    with pytest.raises(LaunchError, match="RAY_USE_TLS is set") as caught:
        server_context({"RAY_USE_TLS": "1", "RAY_TLS_SERVER_CERT": str(tmp_path / "none")})
    assert "RAY_TLS_CA_CERT" in caught.value.hint
