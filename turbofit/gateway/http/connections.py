"""Access control: limits connections, and checks the key, host and origin of requests."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Final, Protocol
from uuid import uuid4

from turbofit.core.errors import UsageError
from turbofit.gateway.config import ConnectionLimits
from turbofit.gateway.http.refusals import Refusal

_RETRY_SECONDS: Final = 2
#: The word under which connections from fronts are counted, instead of an address.
_FRONT: Final = "front"
#: Bits of an IPv6 address that identify a client.
_IPV6_PREFIX: Final = 64
_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
#: The most connections that are accepted before the event loop does other work.
_ACCEPTED_AT_ONCE: Final = 64
#: Seconds after which the server looks again for a free file descriptor.
_ACCEPT_AGAIN: Final = 0.02
#: Seconds that a new connection may take to send its request, at most.
_YOUNG: Final = 1.0
#: The number of connections that may wait in the kernel, and the seconds in which all of them get
#: their turn, even if none of them sends a request.
BACKLOG: Final = 2048
_QUEUE_SECONDS: Final = 10.0
#: The most connections that `Connections.make_room` considers.
_CANDIDATES: Final = 64


class ClientConnection(Protocol):
    def make_room(self) -> None:
        """Close the connection, on which no request runs, to make room for another client."""

    def has_unread(self) -> bool:
        """Return whether unread bytes, probably a request, have come, or a refusal is unsent."""


class Networks:
    """A set of addresses and networks, such as ``10.0.0.7`` and ``10.0.0.0/8``."""

    def __init__(self, networks: Sequence[str]) -> None:
        try:
            self._networks = [ipaddress.ip_network(network) for network in networks]
        except ValueError as exc:
            raise UsageError(
                f"a trusted proxy is no address or network: {exc}",
                hint="write 10.0.0.7, 10.0.0.0/8 or fd00::/8",
            ) from None

    def __contains__(self, host: str) -> bool:
        address = ip_address(host)
        return address is not None and any(address in network for network in self._networks)


def ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that a text is; None for a name."""
    with suppress(ValueError):
        return ipaddress.ip_address(text)
    return None


def address_of(host: str) -> str:
    """Return the address under which a client is counted; for IPv6 it is the /64 network."""
    address = ip_address(host)
    if address is None or address.version == 4:
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address.packed, _IPV6_PREFIX), strict=False))


def is_loopback(host: str) -> bool:
    address = ip_address(host.partition("%")[0])
    return host == "localhost" or (address is not None and address.is_loopback)


class Connections:
    """Counts connections, in all and by address, and closes waiting connections at a limit.

    A connection waits while no request runs on it, because it is idle or its headers are
    incomplete. If there is no room for a new connection, the connection with the longest wait is
    closed: an attacker who holds connections open has always waited longer than a client that sends
    its request. A connection with unread bytes or an unsent refusal is not closed. If no connection
    can be closed among the 64 with the longest waits, the new connection is refused.

    At the limit of one address, only connections of that address are closed. ``proxies`` serve many
    clients, so this limit does not hold for proxies.
    """

    def __init__(
        self, limits: ConnectionLimits, proxies: Networks, count: Callable[[str, str], None]
    ) -> None:
        self._most, self._most_of_one = limits.connections, limits.connections_per_address
        self._proxies, self.count = proxies, count
        #: The address of each open connection, or `_FRONT`.
        self._of: dict[ClientConnection, str] = {}
        self._number_of: Counter[str] = Counter()
        #: Waiting connections and the times when their waits began, the longest wait first.
        self._waiting: OrderedDict[ClientConnection, float] = OrderedDict()
        #: Whether the server ends and cuts off open requests, and the number of requests cut off.
        self.ending, self.cut = False, 0
        #: Whether the server drains: running requests finish, and new requests are refused.
        self.draining = False

    def __len__(self) -> int:
        return len(self._of)

    @property
    def descriptors(self) -> int:
        """The number of file descriptors that the connections may use.

        Each connection uses one descriptor. A connection that is not refused may use a second
        descriptor, for its engine.
        """
        return len(self._of) + min(len(self._of), self._most)

    def lower(self, most: int) -> None:
        """Lower the limit of all connections to ``most``, if it is higher."""
        self._most = min(self._most, most)

    def opened(self, connection: ClientConnection, host: str) -> Refusal | None:
        """Count a new connection; return a refusal if there is no room for it, else None.

        A refused connection also counts until it is closed.
        """
        address, refusal = address_of(host), None
        here = self._number_of[address]
        if here >= self._most_of_one and host not in self._proxies:
            if not self.make_room(address):
                most = self._most_of_one
                refusal = Refusal(
                    "too_many_connections", count=here, most=most, retry_after=_RETRY_SECONDS
                )
        elif len(self._of) >= self._most and not self.make_room():
            refusal = Refusal("busy:connections", most=self._most, retry_after=_RETRY_SECONDS)
        self._count_of(connection, address)
        self.waits(connection)
        return refusal

    def apart(self, connection: ClientConnection) -> None:
        """Stop counting a front's connection for its address, since a front has many clients.

        The connection still counts among all connections.
        """
        if self._of.get(connection, _FRONT) != _FRONT:
            self.closed(connection)
            self._count_of(connection, _FRONT)

    def _count_of(self, connection: ClientConnection, address: str) -> None:
        self._of[connection] = address
        self._number_of[address] += 1

    def waits(self, connection: ClientConnection) -> None:
        """Note that no request runs on a connection from now on."""
        if connection in self._of:
            self._waiting[connection] = time.monotonic()

    def works(self, connection: ClientConnection) -> None:
        """Note that a request runs on a connection from now on."""
        self._waiting.pop(connection, None)

    def closed(self, connection: ClientConnection) -> None:
        """Stop counting a connection; a second call does nothing."""
        self.works(connection)
        address = self._of.pop(connection, None)
        if address is not None:
            self._number_of[address] -= 1
            if not self._number_of[address]:
                del self._number_of[address]

    def make_room(self, address: str | None = None, *, waited: float = 0.0) -> bool:
        """Close the connection that waited longest, if it waited at least ``waited`` seconds.

        A connection with unread bytes or an unsent refusal is never closed. If ``address`` is
        given, only connections of this address may be closed. Return whether a connection was
        closed.
        """
        mine = (c for c in self._waiting if address is None or self._of[c] == address)
        for connection in islice(mine, _CANDIDATES):
            if time.monotonic() - self._waiting[connection] < waited:
                return False
            if not connection.has_unread():
                self.closed(connection)
                self.count("connections_closed_total", "reason=made_room")
                connection.make_room()
                return True
        return False


def young_seconds(descriptors: int) -> float:
    """Return how long a connection may send nothing while others wait for its descriptors.

    A client that has waited in the kernel has sent its request by then. So where few connections
    have room, idle ones make room soon: 1,500 of them held up all clients of 64 descriptors.
    """
    return min(_YOUNG, _QUEUE_SECONDS * (descriptors // 2) / BACKLOG)


class Acceptor:
    """Accepts connections from a ``listener`` while there are free file descriptors.

    Without free descriptors, new connections wait in the kernel. They are accepted when an open
    connection ends, when a connection that has waited for `young_seconds` is closed, or when a slow
    TLS handshake is cancelled. So no request is lost: libuv would accept a connection without a
    free descriptor, and close it. ``most`` is the limit of `Connections.descriptors`.
    `uvicorn.Server.servers` lists this object.
    """

    def __init__(
        self,
        listener: socket.socket,
        connections: Connections,
        most: int,
        protocol: Callable[[], asyncio.Protocol],
        tls: ssl.SSLContext | None,
    ) -> None:
        self._listener, self._connections, self._most = listener, connections, most
        self._protocol, self._tls = protocol, tls
        self._young = young_seconds(most)
        self._loop = asyncio.get_running_loop()
        #: The sockets in a TLS handshake, as tasks, and when each handshake began. `connections`
        #: does not count these sockets yet.
        self._beginning: dict[asyncio.Task[None], float] = {}
        self._again: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._listen()

    def close(self) -> None:
        if self._listener.fileno() >= 0:  # this method may be called twice
            self._loop.remove_reader(self._listener.fileno())
        if self._again is not None:
            self._again.cancel()

    async def wait_closed(self) -> None:
        """Return immediately, since there is nothing to wait for."""

    def _listen(self) -> None:
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _wait(self) -> None:
        """Accept nothing for a while, and cancel slow TLS handshakes."""
        self.close()
        young = time.monotonic() - self._young
        for task, began in self._beginning.items():
            if began < young:
                task.cancel()
        self._again = self._loop.call_later(_ACCEPT_AGAIN, self._listen)

    def _accept(self) -> None:
        """Accept connections that wait in the kernel, while descriptors are free."""
        for _ in range(_ACCEPTED_AT_ONCE):
            taken = self._connections.descriptors + 2 * len(self._beginning)
            if taken >= self._most and not self._connections.make_room(waited=self._young):
                self._wait()
                return
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # other code of this process took the last descriptor
                self._wait()
                return
            client.setblocking(False)
            task = self._loop.create_task(self._begin(client))
            self._beginning[task] = time.monotonic()
            task.add_done_callback(self._beginning.pop)

    async def _begin(self, client: socket.socket) -> None:
        """Make a connection of an accepted socket, after its TLS handshake if there is one."""
        with suppress(OSError, asyncio.TimeoutError):  # the TLS handshake may fail
            await self._loop.connect_accepted_socket(self._protocol, client, ssl=self._tls)


def request_id(headers: Mapping[bytes, bytes]) -> str:
    """Return the client's own request id if it is harmless, else a new one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _ID.fullmatch(given) else uuid4().hex
