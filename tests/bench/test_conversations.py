"""The load of conversations: what it does where a server breaks off."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

from bench.conversations.load import Talks, alike

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


def test_requests_that_begin_alike_say_how_long_the_host_held_the_cards_up() -> None:
    late = iter((0.0, 1e6))

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    async def about(_: web.Request) -> web.Response:
        return web.json_response({"clock": {"factor": 2.0, "late": next(late), "idle": 0.0}})

    async def answer(request: web.Request) -> web.Response:
        assert (await request.json())["messages"][1]["role"] == "assistant"
        event = b'data: {"choices": [{"delta": {"content": "Yes."}}], "usage": null}\n\n'
        return web.Response(body=event, content_type="text/event-stream")

    async def told() -> tuple[int, float]:
        app = web.Application()
        app.router.add_get("/v1/models", models)
        app.router.add_get("/about", about)
        app.router.add_post("/v1/chat/completions", answer)
        async with TestServer(app) as server:
            found = await alike(str(server.make_url("")).rstrip("/"), 8)
        return found.first[0].count, found.late

    count, held_up = asyncio.run(told())
    assert count == 8
    assert held_up > 0
