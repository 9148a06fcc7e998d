"""A server that answers each request as the request's text says, and inputs for it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.measure.load.scripted import ThreadedServer
from tests.support.waiting import until
from turbofit.batch_jobs.output_file import BatchItem


def request(name: str, text: str, **body: Any) -> dict[str, Any]:
    """A line of an input."""
    messages = [{"role": "user", "content": text}]
    return {
        "custom_id": name, "method": "POST", "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": messages, **body},
    }  # fmt: skip


def write_requests(path: Path, texts: dict[str, str]) -> Path:
    """An input of these items."""
    path.write_text("".join(json.dumps(request(*one)) + "\n" for one in texts.items()))
    return path


def items_of(digests: list[int]) -> list[BatchItem]:
    """Items by their digests; 0 is a number without an item."""
    return [BatchItem(number=n, digest=d, custom_id=f"i{n}") for n, d in enumerate(digests, 1) if d]


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of an output."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def text_of(body: dict[str, Any]) -> str:
    """The text of a request."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


TEXTS = {"garbage": "<html>", "nearly": '{"a": tru}', "pretty": '{\n  "a": "b\\n c"\n}'}


class StandIn(ThreadedServer):
    """The first word of a request's text says what it gets, each time but the last of several once.

    They are joined by commas. ``ok`` (as all other words): an answer; a status; ``reset``: the
    connection; ``garbage``; ``nearly`` JSON; ``pretty``: of several lines; ``hold``: an answer once
    `release` was called; ``limited``: with a header.
    """

    def __init__(self, port: int = 0, key: str | None = None) -> None:
        super().__init__(port, key)
        self.running = self.most = 0
        self.seen = Counter[str]()
        self._held: list[asyncio.Transport] = []
        self._released = asyncio.Event()

    def wait_for(self, requests: int) -> None:
        """Until so many have come."""
        until(lambda: len(self.bodies) >= requests, f"{requests} requests")

    def release(self) -> None:
        """Answer what is held, and hold nothing more."""
        self._loop.call_soon_threadsafe(self._released.set)

    def before_end(self) -> None:
        """What is held gets no answer."""
        for transport in self._held:
            transport.abort()
        self._released.set()

    async def chat(self, incoming: web.Request) -> web.StreamResponse:
        body = await incoming.json()
        text = text_of(body)
        self.running += 1
        self.most = max(self.most, self.running)
        self.seen[text] += 1
        self.bodies.append(body)
        try:
            return await self._answer(incoming, text)
        finally:
            self.running -= 1

    async def _answer(self, incoming: web.Request, text: str) -> web.StreamResponse:
        script = text.partition(" ")[0].split(",")
        what = script[min(self.seen[text], len(script)) - 1]
        assert incoming.transport is not None
        if what.isdigit():
            error = {"error": {"message": f"no: {what}", "code": "refused"}}
            return web.json_response(error, status=int(what), headers={"Retry-After": "0"})
        if what in TEXTS:
            return web.Response(text=TEXTS[what])
        if what == "reset":
            incoming.transport.abort()
        elif what == "hold":
            self._held.append(incoming.transport)
            await self._released.wait()
        answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
        headers = {"x-request-id": f"r-{self.seen[text]}"}
        if what == "limited":
            headers["x-turbofit-limited"] = "max_dynamic_patch=24->12"
        return web.json_response(answer, headers=headers)
