"""The application before ``transformers serve``'s own, over a stand-in for that."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests import virtual_time
from turbofit.launch.fallback.front import FallbackApp
from turbofit.launch.fallback.work import ServedWork

_SCOPE = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": []}


class Inner:
    """Fails within its first answer while the model goes on, as a parser of answers may."""

    def __init__(self, work: ServedWork) -> None:
        self.work, self.calls, self.together = work, 0, False

    async def __call__(self, _: Any, __: Any, send: Any) -> None:
        self.calls += 1
        self.together = self.together or not self.work.idle.is_set()
        kind = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        if self.calls == 1:
            self.work.start()
            raise KeyError("a tool call that cannot be parsed")
        await send({"type": "http.response.body", "body": b""})


async def _asked(app: FallbackApp) -> list[Any]:
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    given: asyncio.Queue[Any] = asyncio.Queue()
    given.put_nowait({"type": "http.request", "body": body, "more_body": False})
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await app(dict(_SCOPE), given.get, send)
    return sent


def test_the_next_request_waits_until_a_failed_one_generates_no_more() -> None:
    work = ServedWork()
    inner = Inner(work)

    async def both() -> None:
        app = FallbackApp(inner, work, name="m", session_len=64)
        first = asyncio.ensure_future(_asked(app))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(_asked(app))
        await asyncio.sleep(60)  # virtual
        assert work.cancelled.is_set()  # nobody reads what it generates
        assert inner.calls == 1
        work.done()  # the model's thread has seen it
        with pytest.raises(KeyError):
            await first
        assert (await second)[-1]["body"].endswith(b"[DONE]\n\n")

    virtual_time.run(both())
    assert (inner.calls, inner.together) == (2, False)
