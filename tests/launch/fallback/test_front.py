"""What the server does around Transformers' handlers, over a stand-in for these."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tests import virtual_time
from turbofit.gateway.config import GatewayConfig
from turbofit.launch.fallback.server import FallbackApp, GenerationOptions, ServedModel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_HEADERS = [(b"content-type", b"application/json")]
_SCOPE = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": _HEADERS}


class Handler:
    """Fails within its first answer while the model goes on, as a parser of answers may."""

    def __init__(self, model: ServedModel) -> None:
        self.model, self.calls, self.together = model, 0, False

    async def handle_request(self, _body: Any, _request_id: str) -> Any:
        self.calls += 1
        self.together = self.together or not self.model.idle.is_set()
        return SimpleNamespace(body_iterator=self._events(self.calls))

    async def _events(self, call: int) -> AsyncIterator[str]:
        yield "data: {}\n\n"
        if call == 1:
            self.model.start()
            raise KeyError("a tool call that cannot be parsed")


async def _asked(app: FallbackApp) -> bytes:
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    given: asyncio.Queue[Any] = asyncio.Queue()
    given.put_nowait({"type": "http.request", "body": body, "more_body": False})
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await app(dict(_SCOPE), given.get, send)
    assert sent[0]["status"] == 200
    return b"".join(message["body"] for message in sent[1:])


def test_the_next_request_waits_until_a_failed_one_generates_no_more() -> None:
    model = ServedModel(None, 64)
    handler = Handler(model)
    options = GenerationOptions("m", "m", {}, "float32", 64)

    async def both() -> None:
        app = FallbackApp({"completions": handler}, model, options, GatewayConfig(), lambda _: None)
        first = asyncio.ensure_future(_asked(app))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(_asked(app))
        await asyncio.sleep(60)  # virtual
        assert model.cancelled.is_set()  # nobody reads what it generates
        assert handler.calls == 1
        model.idle.set()  # the model's thread has seen it
        failed = await first
        assert b'"code":"engine_failed"' in failed
        assert failed.endswith(b"data: [DONE]\n\n")
        assert await second == b"data: {}\n\ndata: [DONE]\n\n"

    virtual_time.run(both())
    assert (handler.calls, handler.together) == (2, False)
