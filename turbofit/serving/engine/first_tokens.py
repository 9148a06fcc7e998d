"""Has LMDeploy's server tell the gateway when the first token of a request is there.

An engine encodes a request's images before its first token, so a gateway that limits images waits
for this token (`gateway.limits.gate`). A stream shows the token; an answer in one piece does not,
though LMDeploy reads both token by token. So a request may carry the header ``EXCHANGE`` with a
name, and ``GET PATH`` answers with an endless text: at the first token of each copy of such a
request, a line with its name and the number of its prompt's tokens (`gateway.first_tokens` reads
the lines). No answer is changed.

If LMDeploy's functions are not the ones that were read, the server has no such page.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any, Final

from turbofit.core.messages import EXCHANGE, FIRST_TOKENS
from turbofit.core.process.imports import once_imported, unlike

_MODULE: Final = "lmdeploy.serve.openai.api_server"
#: LMDeploy's functions whose code this module relies on, and the first digits of their sources'
#: SHA-256 in 0.18.0: `serve` makes the app, and all handlers iterate `generate`.
_KNOWN: Final = {"serve": "0974b493e2ea", "AsyncEngine.generate": "3b37d7709dd7"}

#: The name of the request whose handler runs; empty if the request has none.
_NAME: Final = ContextVar("turbofit_exchange", default="")
#: The lines that each open page has yet to send.
_PAGES: Final[set[asyncio.Queue[bytes]]] = set()


def install() -> None:
    """Have this process's server tell first tokens."""
    once_imported(_MODULE, _change)


def _change(module: Any) -> None:
    """Add the page to the server of LMDeploy's module if its code is known."""
    generate, make_app = module.AsyncEngine.generate, module.FastAPI
    for function in (module.serve, generate):
        if why := unlike(function, _KNOWN):
            sys.stderr.write(f"turbofit: first tokens are not told: LMDeploy: {why}\n")
            return

    @wraps(generate)
    def generate_here(*arguments: Any, **keywords: Any) -> AsyncIterator[Any]:
        answer, name = generate(*arguments, **keywords), _NAME.get()
        return _telling(answer, name) if name else answer

    def make_app_here(*arguments: Any, **keywords: Any) -> Any:
        app = make_app(*arguments, **keywords)
        app.add_middleware(_FirstTokens)  # the first one is the innermost: behind the key
        return app

    module.AsyncEngine.generate, module.FastAPI = generate_here, make_app_here


async def _telling(answer: Any, name: str) -> AsyncIterator[Any]:
    """Yield the parts of an answer as they come; at the first part with a token, tell the name."""
    told = False
    try:
        async for part in answer:
            if not told and part.generate_token_len:
                told = True
                for page in _PAGES:
                    page.put_nowait(f"{name} {part.input_token_len}\n".encode())
            yield part
    finally:
        await answer.aclose()


class _FirstTokens:
    """ASGI middleware: answers the page, and notes the names of other requests."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            if scope["path"] == FIRST_TOKENS:
                await _page(receive, send)
                return
            _NAME.set(dict(scope["headers"]).get(EXCHANGE.encode(), b"").decode("latin-1"))
        await self._app(scope, receive, send)


async def _page(receive: Any, send: Any) -> None:
    """Send the lines of first tokens until the reader leaves."""
    lines: asyncio.Queue[bytes] = asyncio.Queue()
    head = {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", b"text/plain")],
    }
    await send(head)
    sending = asyncio.ensure_future(_send_lines(lines, send))
    _PAGES.add(lines)
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    finally:
        _PAGES.discard(lines)
        sending.cancel()


async def _send_lines(lines: asyncio.Queue[bytes], send: Any) -> None:
    line = b"\n"  # the first one sends the headers
    while True:
        await send({"type": "http.response.body", "body": line, "more_body": True})
        line = await lines.get()
