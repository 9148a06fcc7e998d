"""All connections of a gateway: how many there may be, and which one makes room for a new one."""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Final, Protocol

from turbofit.core.errors import UsageError
from turbofit.gateway.http.refusals import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.gateway.config import ConnectionLimits

_RETRY_SECONDS: Final = 2
#: In the place of an address.
_FRONT: Final = "front"
#: Of an IPv6 address: what one client is given.
_IPV6_PREFIX: Final = 64


class ClientConnection(Protocol):
    """One connection, as far as it is counted here."""

    def make_room(self) -> None:
        """Close: no request of it is under way, and another client needs the place."""


class Networks:
    """Addresses and networks, e.g. of trusted proxies.

    Args:
        networks: such as ``10.0.0.7`` and ``10.0.0.0/8``.

    Raises:
        UsageError: a word that is neither.
    """

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
    """Whether a host is this machine itself."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


class Connections:
    """Counts connections, in all and by address.

    A connection waits while no request of it is under way: it is idle, or its headers are not
    whole. Where there is no room, the one that has waited longest is closed for the new one: a
    client that sends its request needs a round trip, one that holds connections open has always
    waited longer. Only where a request is under way on each of them is the new one refused.
    Connections of ``proxies`` are not counted by address, being many clients'.
    """

    def __init__(
        self, limits: ConnectionLimits, proxies: Networks, count: Callable[[str, str], None]
    ) -> None:
        self._most, self._most_of_one = limits.connections, limits.connections_per_address
        self._proxies, self.count = proxies, count
        self._of: dict[ClientConnection, str] = {}
        self._number_of: Counter[str] = Counter()
        #: Those that wait, the longest first.
        self._waiting: OrderedDict[ClientConnection, None] = OrderedDict()
        #: Whether open requests are cut off, since the server ends; and how many were.
        self.ending, self.cut = False, 0
        #: Whether nothing new is taken, while what is open may end.
        self.draining = False

    def __len__(self) -> int:
        return len(self._of)

    def lower(self, most: int) -> None:
        """So many in all, where the system gives room for no more."""
        self._most = min(self._most, most)

    def opened(self, connection: ClientConnection, host: str) -> Refusal | None:
        """Count a new connection, which waits; what to answer where there is no room for it.

        One that is refused is counted too, until it is closed.
        """
        address, refusal = address_of(host), None
        here = self._number_of[address]
        if here >= self._most_of_one and host not in self._proxies:
            if not self._make_room(address):
                refusal = Refusal(
                    "too_many_connections",
                    count=here,
                    most=self._most_of_one,
                    retry_after=_RETRY_SECONDS,
                )
        elif len(self._of) >= self._most and not self._make_room():
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
        """No request of it is under way from now on."""
        if connection in self._of:
            self._waiting[connection] = None

    def works(self, connection: ClientConnection) -> None:
        """A request of it is under way from now on."""
        self._waiting.pop(connection, None)

    def closed(self, connection: ClientConnection) -> None:
        """It is counted no more; may be said twice."""
        self.works(connection)
        address = self._of.pop(connection, None)
        if address is not None:
            self._number_of[address] -= 1
            if not self._number_of[address]:
                del self._number_of[address]

    def _make_room(self, address: str | None = None) -> bool:
        """Close the one that has waited longest, of an address or of all."""
        for connection in self._waiting:
            if address is None or self._of[connection] == address:
                self.closed(connection)
                self.count("connections_closed_total", "reason=made_room")
                connection.make_room()
                return True
        return False
