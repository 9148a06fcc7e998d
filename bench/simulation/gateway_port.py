"""The gateway's port, where uvicorn is in use: HTTP/1.1 comes in and becomes calls of its app."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.simulation.clients import MARK, Request

if TYPE_CHECKING:
    from bench.simulation.world import World

__all__ = ["GatewayPort"]

#: Of an answer that is sent in chunks here.
_LENGTH = b"content-length"


@dataclass
class PortRequest(Request):
    """A request that came as bytes; ``answer`` takes those of its answer.

    Its clients say how long an answer may be.
    """

    raw: bytes = b""
    answer: Callable[[str, Any], None] = field(default=lambda *_: None)

    @property
    def stated(self) -> bool:
        return True

    def payload(self) -> bytes:
        return self.raw

    def said(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            lines = [b"%b: %b" % pair for pair in message["headers"] if pair[0].lower() != _LENGTH]
            lines += [b"Transfer-Encoding: chunked", b"", b""]
            head = b"HTTP/1.1 %d X\r\n" % message["status"]
            self.answer("bytes", head + b"\r\n".join(lines))
            return
        if message.get("body"):
            self.answer("data", message["body"])
        if not message.get("more_body"):
            self.answer("end", None)

    def over(self) -> None:
        if not self.finals:
            self.answer("lost", None)

    def left(self) -> None:
        """Who asked has closed the connection."""
        if self.end:
            return
        if self.loop is None:
            self.gone.set()
        elif not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.gone.set)


class GatewayPort:
    """What listens there: the gateway of the turbofit that clients ask, whichever it is."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.connections: list[Any] = []
        #: As at an engine. Nobody calls them here: who waits is refused.
        self.connecting: list[Callable[[], None]] = []

    @property
    def listening(self) -> bool:
        gateway = self._world.gateway
        return gateway is not None and gateway.listens

    def take(
        self, method: str, path: str, body: bytes, answer: Callable[[str, Any], None]
    ) -> PortRequest:
        """A request came."""
        found = MARK.search(body)
        text = found[2].decode() if found is not None else ""
        one = PortRequest(
            number=len(self._world.requests), client="10.0.3.1", text=text,
            poison=text.startswith("poison"), method=method, path=path, raw=body, answer=answer,
        )  # fmt: skip
        self._world.send(one)
        if one.end:  # nothing listened any more
            one.over()
        return one

    def reset(self) -> None:
        """The turbofit that listened has ended: all connections break."""
        connections, self.connections = self.connections, []
        for connection in connections:
            connection.reset()
