"""Simulated clients: each request is sent to the gateway's ASGI app, and must end exactly once."""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec

from turbofit.core.png import png

if TYPE_CHECKING:
    from bench.simulation.world import World
    from turbofit.gateway.http.app import Gateway

_PATH = "/v1/chat/completions"
#: In a body: its request's number, or the text that equal requests share.
MARK = re.compile(rb"#(?:(\d+)|((?:poison|ask) [\d.e-]+))#")


@cache
def _image(width: int, height: int) -> str:
    return "data:image/png;base64," + b64encode(png(width, height)).decode()


@dataclass
class Request:
    """A request of a client, and its outcome.

    ``stated``: it states the length of its answer. ``leaves``: seconds after which its client goes
    away. ``poison``: it ends its engine, after ``ends_after`` seconds. ``tries``: how often it is
    sent again after a 503. ``end`` is a status, ``left``, ``lost`` (turbofit ended) or ``closed``
    (nothing listened).
    """

    number: int
    client: str
    images: tuple[tuple[int, int], ...] = ()
    units: int = 0
    stream: bool = False
    tokens: int = 3
    stated: bool = True
    leaves: float | None = None
    poison: bool = False
    ends_after: float = 0.03
    tries: int = 5
    text: str = ""
    sent: float = 0.0
    starts: int = 0
    finals: int = 0
    status: int = 0
    end: str = ""
    body: list[bytes] = field(default_factory=list)
    answered_by: list[int] = field(default_factory=list)
    #: Its client is gone.
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def payload(self) -> bytes:
        # Equal requests are equal to the byte: a request that is sent again has no number.
        text = f"#{self.text}#" if MARK.fullmatch(f"#{self.text}#".encode()) else f"#{self.number}#"
        parts: list[Any] = [{"type": "text", "text": text}]
        parts += [
            {"type": "image_url", "image_url": {"url": _image(*size)}} for size in self.images
        ]
        document = {
            "model": "m", "messages": [*self._said(), {"role": "user", "content": parts}],
            "stream": self.stream,
        }  # fmt: skip
        if self.stated:
            document["max_tokens"] = self.tokens
        return msgspec.json.encode(document)

    def _said(self) -> list[dict[str, str]]:
        """What a third of the requests go on with: their client's only conversation."""
        if self.text or self.number % 3:
            return []
        return [
            {"role": "user", "content": f"I am {self.client}."},
            {"role": "assistant", "content": "Go on."},
        ]

    async def run(self, world: World, gateway: Gateway) -> None:
        """Send the request to the gateway, and record its end in the world."""
        gone, sent = self.gone, False

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": self.payload(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.starts += 1
                self.status = message["status"]
            else:
                self.body.append(message.get("body", b""))
                if not message.get("more_body"):
                    self.finals += 1

        scope = {
            "type": "http", "method": "POST", "path": _PATH,
            "raw_path": _PATH.encode(), "query_string": b"",
            "client": (self.client, 1000 + self.number % 60000),
            "headers": [(b"content-type", b"application/json")], "scheme": "http",
            "http_version": "1.1", "server": ("127.0.0.1", 1),
        }  # fmt: skip
        timer = None
        if self.leaves is not None:
            timer = asyncio.get_running_loop().call_later(self.leaves, gone.set)
        try:
            await gateway(scope, receive, send)
        except asyncio.CancelledError:
            self.end = "lost"
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if not self.end and not self.finals and gateway.connections.ending:
                self.end = "lost"  # uvicorn's protocol, which is not simulated, would tell it
            if not self.end:
                self.end = "left" if gone.is_set() and not self.finals else str(self.status)
            world.finished(self)
