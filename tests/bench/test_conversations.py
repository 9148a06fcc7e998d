"""The load of conversations: what it does where a server breaks off."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

from bench.conversations.load import Talks

ANSWER = {"choices": [{"message": {"content": "Yes."}}], "usage": {"prompt_tokens": 8}}


def test_a_turn_that_a_death_cut_off_is_counted_and_sent_again() -> None:
    seen: list[bool] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        """Cut off the first answer, whether it is streamed or not; give the later ones whole."""
        streamed = (await request.json()).get("stream", False)
        seen.append(streamed)
        if len(seen) % 2 == 0:
            return web.json_response(ANSWER)
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b"data: {")
        assert request.transport is not None
        request.transport.abort()
        return response

    async def ask() -> tuple[list[Any], dict[str, int]]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        async with TestServer(app) as server, aiohttp.ClientSession() as session:
            talks = Talks(session, str(server.make_url("")).rstrip("/"), 1.0)
            said = [{"role": "user", "content": "Is it so?"}]
            told = [await talks._ask(1, "m", said, streamed=False) for _ in range(2)]
            told.append(await talks._ask(1, "m", said, streamed=True))
            return told, talks.failed

    told, failed = asyncio.run(ask())
    assert (told, failed) == ([None, "Yes.", None], {"broken off": 2})
    assert seen == [False, False, True]
