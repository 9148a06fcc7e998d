"""Ports, and HTTP without an event loop: to engines on loopback, and to a server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from http.client import HTTPResponse

#: LMDeploy's default port.
DEFAULT_PORT: Final = 23333
LAST_PORT: Final = 65535
#: By an address that a server listens on and no client can ask: an address that reaches it.
EVERY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def port_problem(host: str, port: int) -> str | None:
    """Return why a port cannot be bound; None if it can be."""
    import socket

    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        return f"port {port} cannot be used: {reason}"
    return None


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
