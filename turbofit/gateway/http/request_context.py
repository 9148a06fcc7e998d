"""A request's state on its way through the gateway, its answer, and its record in the log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from turbofit.core.messages import PRETEND_HEADER
from turbofit.core.struct import Document
from turbofit.gateway.grammar_trials import Grammar
from turbofit.gateway.http.connections import address_of, request_id
from turbofit.gateway.http.prepare import PreparedBody
from turbofit.gateway.http.refusals import Api
from turbofit.gateway.http.routes import Route
from turbofit.gateway.routing.engines import RoutedEngine

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_EMPTY: Final = PreparedBody()
#: Headers by which a front names a request's client: its address, and its key's id.
CLIENT: Final = b"x-turbofit-client"
CLIENT_KEY: Final = b"x-turbofit-client-key"
#: Headers of a node's answer that a front passes on.
OF_NODES: Final = ("x-turbofit-limited", PRETEND_HEADER)
_LONGEST_WORD: Final = 64


def uncancel(task: asyncio.Task[Any] | None) -> None:
    """Take back a cancellation by the gateway, since Python 3.11 and later count cancellations."""
    if task is not None and hasattr(task, "uncancel"):
        task.uncancel()


class RequestContext:
    """A client's request: its ASGI scope, its client, and what the gateway has found out.

    ``bytes_out`` is the size of an engine's answer, ``first_byte`` the time of its first byte, by
    `time.perf_counter`. ``started``: the headers of this answer were sent to the client;
    ``broken``: the engine's answer ended before it was complete.
    """

    def __init__(self, scope: Message) -> None:
        #: When the request began, and when its body was read, by `time.perf_counter`.
        self.began_at = self.read_at = time.perf_counter()
        self.scope = scope
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.method: str = scope["method"]
        client = scope.get("client")
        self.client: str = client[0] if client else ""
        self.id = request_id(self.headers)
        self.key = ""
        self.api: Api = "openai"
        self.route: Route | None = None
        self.prepared = _EMPTY
        #: The grammar of the answer, if it has one that was tried.
        self.grammar: Grammar | None = None
        self.engine: RoutedEngine | None = None
        self.status, self.reason, self.bytes_in, self.bytes_out = 0, "", 0, 0
        self.first_byte: float | None = None
        self.gone = self.started = self.broken = False
        #: The client's body, later the body for the engine, and empty while the answer streams.
        self.body = b""
        self.forgotten = False
        self.answer_headers: list[tuple[bytes, bytes]] = [(b"x-request-id", self.id.encode())]

    def is_of_front(self) -> None:
        """Take the client's address and key id from the headers that a front has set."""
        client, key = (self.headers.get(name, b"") for name in (CLIENT, CLIENT_KEY))
        self.client = client.decode("latin-1")[:_LONGEST_WORD]
        self.key = key.decode("latin-1")[:_LONGEST_WORD]

    @property
    def who(self) -> str:
        """The client of the request: the id of its key, or its address if no key is set."""
        return self.key or address_of(self.client)


async def answer(request: RequestContext, send: Send, status: int, body: bytes, kind: str) -> None:
    """Send a whole answer to the client; ``kind`` is its content type."""
    request.status = status
    headers = [
        (b"content-type", kind.encode()),
        (b"content-length", str(len(body)).encode()),
        *request.answer_headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def sent_headers(request: RequestContext, *, to_node: bool = False) -> dict[str, str]:
    """Return the headers for the engine; of the client's headers only ``anthropic-version``.

    ``to_node``: add headers that tell a node who the client is.
    """
    headers = {"X-Request-Id": request.id}
    if to_node:
        headers |= {CLIENT.decode(): request.client, CLIENT_KEY.decode(): request.key}
    if request.method == "POST":
        headers["Content-Type"] = "application/json"
    version = request.headers.get(b"anthropic-version", b"").decode("latin-1")
    if version and version.isascii() and version.isprintable():
        headers["Anthropic-Version"] = version[:40]
    return headers


def log_record(request: RequestContext, path: str) -> Document:
    """Return a request's record for the access log: numbers and names, no prompt, no image.

    ``limited`` lists the values that were lowered to the plan, and ``refused`` is the reason of a
    refusal. ``copies`` is the number of answers that the client asked for.
    """
    prepared, first, now = request.prepared, request.first_byte, time.perf_counter()
    engine = None if request.engine is None else request.engine.index
    first_byte_ms = None if first is None else round((first - request.read_at) * 1e3, 1)
    return {
        "time": round(time.time(), 3),
        "id": request.id,
        "method": request.method,
        "route": path,
        "status": request.status,
        "client": request.client,
        "key": request.key,
        "engine": engine,
        "images": prepared.images,
        "units": prepared.cost.units,
        "copies": prepared.cost.copies,
        "limited": list(prepared.lowered),
        "refused": request.reason,
        "bytes_in": request.bytes_in,
        "bytes_out": request.bytes_out,
        "ms": round((now - request.began_at) * 1e3, 1),
        "ms_first_byte": first_byte_ms,
        "broken": request.broken,
    }
