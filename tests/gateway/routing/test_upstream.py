"""What the gateway asks engines for itself."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("aiohttp")

from turbofit.gateway.routing.engines import RoutedEngine
from turbofit.gateway.routing.upstream import Upstream


def test_an_engine_that_takes_a_request_and_says_nothing_costs_a_page() -> None:
    """Its HTTP server is stuck: the page would hold up whoever judges the engine by it."""
    heard = asyncio.Event()

    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.set()
        await asyncio.Event().wait()
        writer.close()

    async def main() -> str:
        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        upstream = Upstream()
        page = await upstream.page(RoutedEngine(0, f"http://127.0.0.1:{port}"), "/metrics", 0.2)
        await upstream.close()
        server.close()
        return page

    assert asyncio.run(main()) == ""
    assert heard.is_set()
