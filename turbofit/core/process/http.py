"""HTTP without an event loop: to engines on loopback, and from a terminal to a server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from http.client import HTTPResponse


def opened(url: str, body: Any = None, key: str | None = None, *, timeout: float) -> HTTPResponse:
    """Send a GET, or a POST of ``body`` as JSON, past any proxy; returns an answer of any status.

    Raises:
        OSError: nobody answers within ``timeout`` seconds of silence.
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
