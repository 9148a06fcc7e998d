"""Who may ask: how many connections there may be, which one makes room, keys, names, web pages."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import socket
import time
from collections import Counter, OrderedDict
from contextlib import suppress
from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING, Final, Protocol
from uuid import uuid4

from turbofit.core.errors import UsageError
from turbofit.gateway.http.refusals import Refusal

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping, Sequence

    from turbofit.gateway.config import ConnectionLimits, GatewayConfig

_RETRY_SECONDS: Final = 2
#: In the place of an address.
_FRONT: Final = "front"
#: Of an IPv6 address: what one client is given.
_IPV6_PREFIX: Final = 64
_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ID_SHOWN: Final = 8
_ORIGIN_SHOWN: Final = 80
#: Connections that are taken before others have their turn, and seconds between looks for a free
#: descriptor.
_ACCEPTED_AT_ONCE: Final = 64
_ACCEPT_AGAIN: Final = 0.02
#: Seconds in which a new connection sends its request.
_YOUNG: Final = 1.0
#: Connections that are looked at for one that makes room.
_CANDIDATES: Final = 64
_NAME_SHOWN: Final = 80
#: A list of header names.
_NAMES: Final = re.compile(rb"[A-Za-z0-9_-]{1,64}(?:, ?[A-Za-z0-9_-]{1,64}){0,63}")
_USUAL: Final = b"authorization, content-type, x-api-key, x-request-id, anthropic-version"


class ClientConnection(Protocol):
    def make_room(self) -> None:
        """Close: no request of it is under way, and another client needs the place."""

    def has_unread(self) -> bool:
        """Whether bytes wait to be read, a request most likely, or a refusal to be sent."""


class Networks:
    """Addresses and networks, such as ``10.0.0.7`` and ``10.0.0.0/8``."""

    def __init__(self, networks: Sequence[str]) -> None:
        word = ""
        try:
            self._networks = [ipaddress.ip_network(word := network) for network in networks]
        except ValueError as exc:
            raise UsageError(
                f"{word!r} is no address or network: {exc}",
                hint="write 10.0.0.7, 10.0.0.0/8 or fd00::/8",
            ) from None

    def __contains__(self, host: str) -> bool:
        if not self._networks:
            return False
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return any(address in network for network in self._networks)


def address_of(host: str) -> str:
    """Whose address it is: an IPv6 client may use any address of its /64."""
    if ":" not in host:
        return host
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address.packed, _IPV6_PREFIX), strict=False))


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


class Connections:
    """Counts connections, in all and by address.

    A connection waits while no request of it is under way: it is idle, or its headers are not
    whole. Where there is no room, the one that has waited longest is closed for the new one: who
    holds connections open has always waited longer than a client that sends its request. None is
    closed whose request has come and is not read yet. The new one is refused only where a request
    is under way on each of them. Connections of ``proxies`` are
    not counted by address, being many clients'.
    """

    def __init__(
        self, limits: ConnectionLimits, proxies: Networks, count: Callable[[str, str], None]
    ) -> None:
        self._most, self._most_of_one = limits.connections, limits.connections_per_address
        self._proxies, self.count = proxies, count
        self._of: dict[ClientConnection, str] = {}
        self._number_of: Counter[str] = Counter()
        #: Those that wait, the longest first, and since when.
        self._waiting: OrderedDict[ClientConnection, float] = OrderedDict()
        #: Whether open requests are cut off, since the server ends; and how many were.
        self.ending, self.cut = False, 0
        #: Whether nothing new is taken, while what is open may end.
        self.draining = False

    def __len__(self) -> int:
        return len(self._of)

    @property
    def descriptors(self) -> int:
        """Those of all connections, and of an engine's for each that is not refused."""
        return len(self._of) + min(len(self._of), self._most)

    def lower(self, most: int) -> None:
        self._most = min(self._most, most)

    def opened(self, connection: ClientConnection, host: str) -> Refusal | None:
        """Count a new connection, which waits; what to answer where there is no room for it.

        One that is refused is counted too, until it is closed.
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
        """Count it by no address: it is a front's, which speaks for many clients."""
        if self._of.get(connection, _FRONT) != _FRONT:
            self.closed(connection)
            self._count_of(connection, _FRONT)

    def _count_of(self, connection: ClientConnection, address: str) -> None:
        self._of[connection] = address
        self._number_of[address] += 1

    def waits(self, connection: ClientConnection) -> None:
        if connection in self._of:
            self._waiting[connection] = time.monotonic()

    def works(self, connection: ClientConnection) -> None:
        self._waiting.pop(connection, None)

    def closed(self, connection: ClientConnection) -> None:
        """It is counted no more; may be said twice."""
        self.works(connection)
        address = self._of.pop(connection, None)
        if address is not None:
            self._number_of[address] -= 1
            if not self._number_of[address]:
                del self._number_of[address]

    def make_room(self, address: str | None = None, *, waited: float = 0.0) -> bool:
        """Close the one that has waited longest, of an address or of all: so many seconds."""
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


class Acceptor:
    """Takes connections from a ``listener`` while there are descriptors for them.

    Where there are none, the others wait in the kernel until one ends, or one that has waited for
    a second makes room, as do TLS handshakes that take longer. Without a free descriptor libuv
    takes a connection to close it, under its client's request. ``most`` are those of
    `Connections.descriptors`. To a `uvicorn.Server` it is one of its servers.
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
        self._loop = asyncio.get_running_loop()
        #: Those that are not connections yet, and since when: with TLS until the handshake's end.
        self._beginning: dict[asyncio.Task[None], float] = {}
        self._again: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._listen()

    def close(self) -> None:
        if self._listener.fileno() >= 0:  # it may be closed a second time
            self._loop.remove_reader(self._listener.fileno())
        if self._again is not None:
            self._again.cancel()

    async def wait_closed(self) -> None:
        """There is nothing to wait for."""

    def _listen(self) -> None:
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _wait(self) -> None:
        self.close()
        young = time.monotonic() - _YOUNG
        for task, began in self._beginning.items():
            if began < young:
                task.cancel()
        self._again = self._loop.call_later(_ACCEPT_AGAIN, self._listen)

    def _has_room(self) -> bool:
        taken = self._connections.descriptors + 2 * len(self._beginning)
        return taken < self._most or self._connections.make_room(waited=_YOUNG)

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            if not self._has_room():
                self._wait()
                return
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no descriptor all the same
                self._wait()
                return
            client.setblocking(False)
            task = self._loop.create_task(self._begin(client))
            self._beginning[task] = time.monotonic()
            task.add_done_callback(self._beginning.pop)

    async def _begin(self, client: socket.socket) -> None:
        with suppress(OSError, asyncio.TimeoutError):  # in the TLS handshake
            await self._loop.connect_accepted_socket(self._protocol, client, ssl=self._tls)


class Hosts:
    """Names by which a server may be asked that needs no key, beside every address.

    A web page can let its own name lead to its visitor's loopback (DNS rebinding). To the browser
    the server is then of that page, whose requests carry no ``Origin``, but its name as ``Host``.
    A server beyond the loopback answers everybody who reaches it, unless names are ``allowed``;
    ``*`` allows all. No page has a name under ``internal``, which ICANN delegates to nobody; a
    container calls its host ``host.docker.internal``.
    """

    def __init__(self, config: GatewayConfig) -> None:
        allowed = {name.lower().rstrip(".") for name in config.allowed_hosts}
        self._keyed = bool(config.api_keys or config.front_keys)
        safe = not allowed and (self._keyed or not is_loopback(config.host))
        self._any = safe or "*" in allowed
        self._names = {"localhost", config.host.lower(), socket.gethostname().lower(), *allowed}

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Refuse what asks for somebody else; HTTP/1.0 may ask for nobody.

        Raises:
            Refusal: the name is not one of this gateway.
        """
        host = headers.get(b"host")
        if self._any or host is None:
            return
        name = _name_of(host)
        if not self._knows(name):
            raise Refusal("host", name=name[:_NAME_SHOWN])

    def _knows(self, name: str) -> bool:
        private = name.endswith((".localhost", ".internal"))
        return name in self._names or private or _is_address(name)

    def comes_from_page(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a request with an ``Origin`` is of the page that this server shows itself.

        A page that let its own name lead here has that name as ``Host`` too: without a key the name
        must be one that no such page has.
        """
        host = headers.get(b"host", b"")
        if headers[b"origin"].partition(b"://")[2].lower() != host.lower() or not host:
            return False
        return self._keyed or self._knows(_name_of(host))


def _name_of(host: bytes) -> str:
    """The name in a ``Host``, without its port."""
    name = host.decode("latin-1").lower()
    name = name[1:].partition("]")[0] if name[:1] == "[" else name.partition(":")[0]
    return name.rstrip(".")


def _is_address(host: str) -> bool:
    with suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


class Keys:
    """API keys, compared in constant time and kept as hashes only; without any, everybody may.

    ``fronts`` are keys of fronts, which say whose each request is.
    """

    def __init__(self, keys: Sequence[str], fronts: Sequence[str] = ()) -> None:
        #: Those of fronts first.
        self._hashes = [sha256(key.encode()).digest() for key in (*fronts, *keys) if key]
        self._fronts = sum(map(bool, fronts))

    def check(self, headers: Mapping[bytes, bytes]) -> tuple[str, bool]:
        """Who it is by the beginning of the key's hash, and whether the key is a front's.

        Raises:
            Refusal: a key is needed, and none that is known was shown.
        """
        if not self._hashes:
            return "", False
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        key = given.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        mine = sha256(key).digest()
        # All are compared, so that the time tells nothing about which one is near.
        equal = [hmac.compare_digest(mine, known) for known in self._hashes]
        if not any(equal):
            raise Refusal("unauthorized")
        return mine.hex()[:_ID_SHOWN], any(equal[: self._fronts])


class Origins:
    """Web pages that may use the server from a browser, as ``https://chat.example.com`` or ``*``.

    A page can send requests to a server on its visitor's own machine. Those carry an ``Origin``,
    which other clients do not send; one that was not allowed is refused. The server's own page,
    by the names of ``hosts``, needs no leave.
    """

    def __init__(self, allowed: Sequence[str], hosts: Hosts) -> None:
        self._any, self._allowed = "*" in allowed, frozenset(o.rstrip("/") for o in allowed)
        self._hosts = hosts

    def check(self, headers: Mapping[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
        """Response headers for the page.

        Raises:
            Refusal: the page is of an origin that is not allowed.
        """
        origin = headers.get(b"origin")
        if origin is None:
            return ()
        page = origin.decode("latin-1")
        if not self._any and page not in self._allowed:
            if self._hosts.comes_from_page(headers):
                return ()
            raise Refusal("origin", page=page[:_ORIGIN_SHOWN])
        value = b"*" if self._any else origin
        return (
            (b"access-control-allow-origin", value),
            (b"access-control-expose-headers", b"x-request-id, x-turbofit-limited, retry-after"),
            (b"vary", b"Origin"),
        )

    def preflight(self, headers: Mapping[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
        """Response headers for a browser's question before the request.

        Raises:
            Refusal: its page may not ask, or it names no page.
        """
        allowed = self.check(headers)
        if not allowed:
            raise Refusal("method_not_allowed:options")
        wanted = headers.get(b"access-control-request-headers", b"")
        return (
            *allowed,
            (b"access-control-allow-methods", b"GET, POST"),
            # What the page asks for, since SDKs send headers of their own (x-stainless-os); those
            # that are not known here go no further.
            (b"access-control-allow-headers", wanted if _NAMES.fullmatch(wanted) else _USUAL),
            (b"access-control-max-age", b"600"),
        )


def request_id(headers: Mapping[bytes, bytes]) -> str:
    """The client's own id where it is harmless, else a new one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _ID.fullmatch(given) else uuid4().hex
