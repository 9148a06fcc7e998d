"""Servers that answer each request as a script says."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping
from typing import Any

from aiohttp import web
from typing_extensions import Self


class ThreadedServer:
    """An OpenAI-compatible server of the model ``m`` in a thread; a context manager.

    ``models`` is the status of ``/v1/models``.
    """

    gets = "/v1/models"

    def __init__(self, port: int = 0, key: str | None = None, models: int = 200) -> None:
        self.port, self._key, self._models = port, key, models
        self.bodies: list[dict[str, Any]] = []
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._serve(),), daemon=True
        )
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()
            self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def chat(self, incoming: web.Request) -> web.StreamResponse:
        """The answer to a request."""
        raise NotImplementedError

    def before_end(self) -> None:
        """Let go of what is under way."""

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        app = web.Application(client_max_size=1 << 30, middlewares=[self._let_in])
        app.router.add_get(self.gets, self.page)
        app.router.add_post("/v1/chat/completions", self.chat)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = runner.addresses[0][1]
        self._ready.set()
        await self._end.wait()
        self.before_end()
        await runner.cleanup()

    @web.middleware
    async def _let_in(self, incoming: web.Request, handler: Any) -> web.StreamResponse:
        if self._key and incoming.headers.get("Authorization") != f"Bearer {self._key}":
            return web.json_response({"error": "who?"}, status=401)
        response: web.StreamResponse = await handler(incoming)
        return response

    async def page(self, _: web.Request) -> web.Response:
        """The answer to a GET of that path."""
        return web.json_response({"data": [{"id": "m"}]}, status=self._models)


def event(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
USAGE = (
    b'data: {"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 3, '
    b'"prompt_tokens_details": {"cached_tokens": 12}}}\n\n'
)
#: What a stream holds, by the word of the script; ``reset`` and ``stall`` do not end after it.
STREAMS = {
    "garbage": b"<html>\n\n",
    "error": b'data: {"error": {"message": "out of order"}}\n\n',
    "empty": DONE,
    "ok": event("a") + event("b") + event("c") + USAGE + DONE,
    **dict.fromkeys(("cut", "reset", "stall"), event("a")),
}
#: What is no stream.
WHOLE: dict[str, dict[str, Any]] = {
    "500": {"status": 500, "text": '{"error": {"message": "no"}}'},
    "busy": {"status": 503, "headers": {"Retry-After": "0"}},
    "plain": {"text": '{"choices": []}', "content_type": "application/json"},
}


class ScriptedServer(ThreadedServer):
    """``script`` is what each streamed request gets; then ``ok``.

    A key of `STREAMS`, of which ``reset`` aborts the connection and ``stall`` sends nothing more
    until the server ends; ``500``; ``plain``: JSON; ``busy``: 503 with Retry-After. ``headers``
    come with each stream.
    """

    def __init__(
        self, *script: str, headers: Mapping[str, str] | None = None, **keywords: Any
    ) -> None:
        super().__init__(**keywords)
        self._headers = headers or {}
        self._script = list(script)
        self.stalled = threading.Event()

    async def chat(self, incoming: web.Request) -> web.StreamResponse:
        self.bodies.append(await incoming.json())
        what = self._script.pop(0) if self._script else "ok"
        if what in WHOLE:
            return web.Response(**WHOLE[what])
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", **self._headers}
        )
        await response.prepare(incoming)
        await response.write(STREAMS[what])
        if what == "reset":
            assert incoming.transport is not None
            incoming.transport.abort()
        elif what == "stall":
            self.stalled.set()
            await self._end.wait()
        else:
            await response.write_eof()
        return response
