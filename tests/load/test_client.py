from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from turbofit.load import client as client_module
from turbofit.load.client import LoadClient

PAGE = b'{"data": [{"id": "m"}]}'


class Exchange:
    """A response whose body comes in packets: as aiohttp does, one read ends with one packet."""

    def __init__(self, *packets: bytes, status: int = 200) -> None:
        self.status, self.headers, self.packets = status, {}, list(packets)
        self.content = self

    async def __aenter__(self) -> Exchange:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def read(self, size: int) -> bytes:
        if not self.packets:
            return b""
        data, rest = self.packets[0][:size], self.packets[0][size:]
        self.packets[:1] = [rest] if rest else []
        return data


def answered(exchange: Exchange, ask: Any) -> Any:
    """What the client finds where each of its requests gets this response."""

    async def go() -> Any:
        client = LoadClient("http://server", None, timeout=1.0)
        await client._session.close()
        send = lambda *_, **__: exchange  # noqa: E731
        client._session = SimpleNamespace(request=send, post=send)  # type: ignore[assignment]
        return await ask(client)

    return asyncio.run(go())


@pytest.mark.parametrize("at", range(1, len(PAGE), 5))
def test_a_page_that_comes_in_packets_is_read_whole(at: int) -> None:
    assert answered(Exchange(PAGE[:at], PAGE[at:]), lambda client: client.model()) == "m"


def test_of_an_endless_error_only_the_beginning_is_read() -> None:
    exchange = Exchange(b"out of ", *[b"memory" * 4096] * 9, status=500)
    answer = answered(exchange, lambda client: client.ask({}))
    assert answer.kind == "status 500"
    assert answer.example.startswith("out of memory")
    read = 7 + 9 * 6 * 4096 - sum(map(len, exchange.packets))
    assert read == client_module._LARGEST_ERROR
