"""On pretend GPUs every answer says so.

``x-turbofit-pretend: 1``, and ``"pretend": true`` in ``/health``.
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["Announce"]


class Announce:
    """An ASGI app around another: each answer says that the GPUs behind it are pretend ones."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun: dict[str, Any] = {}
        health = scope["path"].rstrip("/") == "/health"

        async def said(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"x-turbofit-pretend", b"1")]
                begun.update(message, headers=headers)
                if not health:
                    await send(begun)
                return
            if health:
                message = {**message, "body": _with_pretend(message.get("body", b""))}
                length = str(len(message["body"])).encode()
                begun["headers"] = [
                    (name, length if name == b"content-length" else value)
                    for name, value in begun["headers"]
                ]
                await send(begun)
            await send(message)

        await self._app(scope, receive, said)


def _with_pretend(body: bytes) -> bytes:
    try:
        document = json.loads(body)
    except ValueError:
        return body
    return json.dumps({**document, "pretend": True}).encode()
