"""Sockets: how soon one ends after the machine at its other end has vanished, and how many."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["engine_socket", "tcp_socket", "vanished"]

#: A connection on which nothing moves is asked after 2 s, each second, three times.
_KEEP_ALIVE: Final = (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3))
_UNHEARD_MS: Final = 5000


def engine_socket(address: Sequence[Any]) -> socket.socket:
    """A socket to an engine, for aiohttp to connect.

    A machine without power says no farewell: a request there would wait for as long as for an
    answer, a quarter of an hour for what was just sent. The engine's kernel answers for it however
    busy it is, so that only a machine or a network counts as gone. One exception, on the safe side
    where another engine is up: an engine that reads nothing for 5 s in the middle of a body that
    its kernel has no room for is given up as well. Nothing of that on a machine's own addresses,
    which do not vanish alone.

    Args:
        address: as `socket.getaddrinfo` gives it.
    """
    family, kind, proto, _, where = address
    made = socket.socket(family, kind, proto)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = [*_KEEP_ALIVE]
    if not _is_loopback(where[0]):
        options.append(("TCP_USER_TIMEOUT", _UNHEARD_MS))
    for name, value in options:
        if hasattr(socket, name):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made


def tcp_socket(family: int) -> socket.socket:
    """A TCP socket of this process.

    Raises:
        LaunchError: there is none to be had.
    """
    try:
        # asyncio turns Nagle's algorithm off (40 ms an answer) only where the protocol is named.
        return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as exc:
        raise LaunchError(
            f"no socket can be made: {exc.strerror or exc}",
            hint="raise ulimit -n, or end programs that hold sockets (ss -s)",
        ) from None


def vanished(exc: BaseException | None) -> bool:
    """Whether a connection broke because its other end was not heard of any more."""
    while exc is not None:
        if isinstance(exc, OSError) and exc.errno == errno.ETIMEDOUT:
            return True
        exc = exc.__cause__ or exc.__context__
    return False


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
