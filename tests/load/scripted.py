"""A server that answers each request as its script says."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from typing import Any

from aiohttp import web

__all__ = ["ScriptedServer"]


def event(text: str, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return b"data: " + json.dumps({"choices": [choice], **more}).encode() + b"\n\n"


class ScriptedServer:
    """A context manager in a thread. ``script`` is what each streamed request gets; then ``ok``.

    ``ok``: three tokens; ``500``; ``garbage``; ``cut``: no end; ``stall``: nothing after the first
    token until the server ends; ``reset``: the connection; ``error``: an event; ``empty``: no
    choice; ``plain``: JSON; ``busy``: 503 with Retry-After.
    """

    def __init__(self, *script: str, models: int = 200, key: str | None = None) -> None:
        self._script, self._models, self._key = list(script), models, key
        self.bodies: list[dict[str, Any]] = []
        self.seen = Counter[str]()
        self.stalled = threading.Event()
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> ScriptedServer:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/v1/models", self._list)
        app.router.add_post("/v1/chat/completions", self._chat)
        runner = web.AppRunner(app, shutdown_timeout=0.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await self._end.wait()
        await runner.cleanup()

    async def _list(self, request: web.Request) -> web.Response:
        if self._key and request.headers.get("Authorization") != f"Bearer {self._key}":
            return web.json_response({"error": "who?"}, status=401)
        return web.json_response({"data": [{"id": "m"}]}, status=self._models)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not body.get("stream"):
            words = len(body["messages"][0]["content"].split())
            return web.json_response({"usage": {"prompt_tokens": 10 + 2 * words}})
        self.bodies.append(body)
        what = self._script.pop(0) if self._script else "ok"
        self.seen[what] += 1
        if what == "500":
            return web.json_response({"error": {"message": "no"}}, status=500)
        if what == "busy":
            return web.Response(status=503, headers={"Retry-After": "0"})
        if what == "plain":
            return web.json_response({"choices": []})
        return await self._stream(request, what)

    async def _stream(self, request: web.Request, what: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if what == "garbage":
            await response.write(b"<html>\n\n")
        elif what == "error":
            await response.write(b'data: {"error": {"message": "out of order"}}\n\n')
        elif what == "empty":
            await response.write(b"data: [DONE]\n\n")
        else:
            await response.write(event("a"))
            if what == "reset":
                assert request.transport is not None
                request.transport.abort()
                return response
            if what == "stall":
                self.stalled.set()
                await self._end.wait()
                return response
            if what != "cut":
                await response.write(event("b") + event("c"))
                usage = {"prompt_tokens": 30, "completion_tokens": 3}
                await response.write(
                    b'data: {"choices": [], "usage": %s}\n\n' % json.dumps(usage).encode()
                )
                await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response
