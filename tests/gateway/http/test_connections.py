"""Which connections make room for others."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import closing
from typing import Any

import pytest

from tests.gateway.http.test_protocol import LONG, WHOLE, answered, connected, health, serving
from tests.support.waiting import HANG
from turbofit.core.errors import UsageError
from turbofit.gateway.config import ConnectionLimits
from turbofit.gateway.http.connections import (
    BACKLOG,
    Acceptor,
    Connections,
    Networks,
    address_of,
    young_seconds,
)


class One:
    closed = unread = False

    def make_room(self) -> None:
        self.closed = True

    def has_unread(self) -> bool:
        return self.unread


def make(most: int = 4, of_one: int = 2) -> tuple[Any, list[tuple[str, str]]]:
    limits = ConnectionLimits(connections=most, connections_per_address=of_one)
    counted: list[tuple[str, str]] = []
    return Connections(limits, Networks(()), lambda *words: counted.append(words)), counted


def test_the_one_that_waited_longest_makes_room_and_one_at_work_never() -> None:
    all_, counted = make(of_one=99)
    ones = [One() for _ in range(6)]
    for number in range(4):
        assert all_.opened(ones[number], f"10.0.0.{number}") is None
    all_.works(ones[0])
    assert all_.opened(ones[4], "10.0.0.9") is None
    assert [n for n, conn in enumerate(ones) if conn.closed] == [1]
    assert counted == [("connections_closed_total", "reason=made_room")]
    assert len(all_) == 4
    all_.works(ones[2])
    all_.waits(ones[2])  # it waits again, and is the youngest of those that do
    assert all_.opened(ones[5], "10.0.0.9") is None
    assert [n for n, conn in enumerate(ones) if conn.closed] == [1, 3]


def test_one_whose_request_has_come_makes_no_room() -> None:
    all_, _ = make(most=2, of_one=99)
    ones = [One() for _ in range(4)]
    ones[0].unread = ones[2].unread = True
    for number in range(3):
        assert all_.opened(ones[number], f"10.0.0.{number}") is None
    assert [conn.closed for conn in ones[:3]] == [False, True, False]
    refusal = all_.opened(ones[3], "10.0.0.9")
    assert (refusal.reason, refusal.status) == ("busy", 503)
    ones[2].unread = False
    assert not all_.make_room(waited=1000.0)  # it is too young
    assert all_.make_room()
    assert ones[2].closed


def test_without_descriptors_clients_wait_and_none_is_reset(monkeypatch) -> None:
    monkeypatch.setattr("turbofit.gateway.http.uvicorn_server.open_files", lambda _: 64)
    with serving(LONG) as gateway:
        clients = [connected(gateway) for _ in range(80)]
        for client in clients:
            client.sendall(WHOLE.replace(b"host:", b"connection: close\r\nhost:"))
        for client in clients:
            assert gateway.app.connections.descriptors <= 32
            assert answered(client)[0] == 200
            client.close()
        idle = [connected(gateway) for _ in range(40)]
        assert health(gateway) == 200  # one that asks for nothing makes room
        for client in idle:
            client.close()


def test_idle_connections_make_room_soon_where_few_have_room() -> None:
    """However many wait in the kernel, the last of them has its turn after ten seconds."""
    for descriptors in (32, 200, 600):
        assert young_seconds(descriptors) * BACKLOG / (descriptors // 2) <= 10.0
    assert young_seconds(32) > 0.05  # a request that comes behind its connection is waited for
    assert young_seconds(8192) == young_seconds(1024) == 1.0


def test_a_tls_handshake_that_never_ends_makes_room(monkeypatch) -> None:
    """Nobody counts it by its address yet, and it would hold its descriptors for a minute."""
    monkeypatch.setattr("turbofit.gateway.http.connections._YOUNG", 0.0)
    monkeypatch.setattr("asyncio.constants.SSL_HANDSHAKE_TIMEOUT", 2 * HANG)
    listener = socket.create_server(("127.0.0.1", 0))

    async def drive() -> None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        acceptor = Acceptor(listener, make()[0], 2, asyncio.Protocol, tls)
        loop, address = asyncio.get_running_loop(), listener.getsockname()
        silent, other = socket.socket(), socket.socket()
        with closing(silent), closing(other):
            for client in (silent, other):
                client.setblocking(False)
                await loop.sock_connect(client, address)
            assert await asyncio.wait_for(loop.sock_recv(silent, 1), HANG) == b""
        acceptor.close()

    with closing(listener):
        asyncio.run(drive())


def test_where_all_are_at_work_a_new_one_is_refused_and_counted_until_it_ends() -> None:
    all_, _ = make(most=2, of_one=99)
    first, second, third, fourth = (One() for _ in range(4))
    for conn in (first, second):
        assert all_.opened(conn, "10.0.0.1") is None
        all_.works(conn)
    refusal = all_.opened(third, "10.0.0.2")
    assert (refusal.status, refusal.retry_after) == (503, 2)
    assert "all 2 connections" in refusal.message
    assert len(all_) == 3
    # The refused one waits for its end: it is the next to go.
    all_.opened(fourth, "10.0.0.3")
    assert third.closed
    for conn in (fourth, fourth, first):
        all_.closed(conn)
    assert len(all_) == 1
    assert all_.opened(One(), "10.0.0.3") is None


def test_an_address_makes_room_for_itself_only() -> None:
    all_, _ = make()
    other, ones = One(), [One() for _ in range(4)]
    assert all_.opened(other, "10.0.0.1") is None
    for conn in ones[:3]:
        assert all_.opened(conn, "10.0.0.2") is None
    assert (other.closed, ones[0].closed, len(all_)) == (False, True, 3)
    for conn in ones[1:3]:
        all_.works(conn)
    refusal = all_.opened(ones[3], "10.0.0.2")
    assert (refusal.status, refusal.reason) == (429, "too_many_connections")
    assert refusal.facts == {"count": 2, "most": 2}
    assert not other.closed


def test_networks_and_that_an_ipv6_client_is_its_64() -> None:
    assert "10.1.2.3" in Networks(["10.0.0.0/8", "::1"])
    assert "::1" in Networks(["::1"])
    for host in ("127.0.0.1", "nonsense"):
        assert host not in Networks(["::1"])
    for word in ("proxy.example.com", "10.0.0.1/8", "", "10.0.0.0/33"):
        with pytest.raises(UsageError) as caught:
            Networks([word])
        assert word in caught.value.message
    for host in ("10.0.0.1", "::ffff:10.0.0.1"):
        assert address_of(host) == "10.0.0.1"
    assert address_of("2001:db8::1") == address_of("2001:db8::ffff:1") == "2001:db8::/64"
    assert address_of("2001:db8:0:1::1") != "2001:db8::/64"
    assert address_of("not:an:address") == "not:an:address"
