"""Ports, and HTTP without an event loop: to engines on loopback, and to a server."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import LaunchError

if TYPE_CHECKING:
    import socket
    from contextlib import ExitStack
    from http.client import HTTPResponse

#: LMDeploy's default port.
DEFAULT_PORT: Final = 23333
LAST_PORT: Final = 65535
#: Engines listen only here: their management routes are open to every client.
LOOPBACK: Final = "127.0.0.1"
#: Ports for engines; Linux uses ports from 32768 on for outgoing connections.
_PORTS: Final = range(20000, 32768)
#: For each address that means all interfaces: the address by which a client reaches the server.
EVERY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def port_problem(host: str, port: int) -> str | None:
    """Return why a port cannot be bound; None for a port that can be bound."""
    import socket

    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as exc:
        return f"port {port} cannot be used: {exc.strerror}"
    return None


def free_ports(count: int, holders: ExitStack, besides: int | None = None) -> list[int]:
    """Find ``count`` free ports on loopback other than ``besides``; hold and return these ports.

    Until ``holders`` closes, a bound socket that does not listen keeps other programs from each
    port. An engine can nevertheless listen at its port, because it sets SO_REUSEADDR. On a
    system where it cannot, the ports are not held. The ports are below the range for outgoing
    connections: the kernel gives a port of that range to any client, even to turbofit's own request
    to an engine that does not listen yet.

    Raises:
        LaunchError: too few ports are free, or no socket can be made.
    """
    import random
    import socket

    ports: list[int] = []
    endpoint = holders.enter_context(tcp_socket(socket.AF_INET))
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        if port == besides:
            continue
        with suppress(OSError):  # the port is in use: the same socket tries the next one
            endpoint.bind((LOOPBACK, port))
            endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # On gVisor's network an engine cannot listen at a held port.
            if port_problem(LOOPBACK, port) is not None:
                endpoint.close()
            ports.append(port)
            if len(ports) == count:
                return ports
            endpoint = holders.enter_context(tcp_socket(socket.AF_INET))
    raise LaunchError("no port on loopback is free", hint="ss -tln lists the ports in use")


def tcp_socket(family: int) -> socket.socket:
    """Make a TCP socket.

    Raises:
        LaunchError: no socket can be made.
    """
    import socket

    try:
        # asyncio turns off Nagle's algorithm (40 ms per answer) only if the protocol is named.
        return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as exc:
        raise LaunchError(
            f"no socket can be made: {exc.strerror or exc}",
            hint="raise ulimit -n, or end programs that hold sockets (ss -s)",
        ) from None


def open_files(need: int) -> int:
    """Raise the limit of open files to ``need``, or as far as possible.

    Return how many of the ``need`` files may now be open.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= need:
        return need
    raised = need if hard == resource.RLIM_INFINITY else min(need, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    except (OSError, ValueError):  # a sandbox may forbid what the limit allows
        return soft
    return raised


def opened(url: str, body: Any = None, key: str | None = None, *, timeout: float) -> HTTPResponse:
    """Send a GET, or a POST of ``body`` as JSON, without a proxy; return the answer of any status.

    Raises:
        OSError: no connection is made, or no byte comes for ``timeout`` seconds.
        http.client.HTTPException: the answer is not HTTP.
    """
    from urllib.error import HTTPError, URLError
    from urllib.request import ProxyHandler, Request, build_opener

    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        answer: Any = build_opener(ProxyHandler({})).open(
            Request(url, data, headers), timeout=timeout
        )
    except HTTPError as exc:
        answer = exc
    except URLError as exc:
        raise exc.reason if isinstance(exc.reason, OSError) else exc from None
    response: HTTPResponse = answer
    return response
