"""Whatever bytes a connection brings, in pieces: answers, and nothing is left when it ends."""

from __future__ import annotations

import asyncio
from copy import copy
from typing import Any

import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("uvicorn")

from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.server import ServerState

from tests.hostile import hostile
from tests.support.gateway import gateway
from turbofit.gateway.http.protocol import limited_protocol
from turbofit.gateway.server import _uvicorn

#: Turns of the loop after which nobody has anything to do but to wait for more.
TURNS = 40


class Wire(asyncio.Transport):
    """A transport into nothing, which remembers what was written."""

    def __init__(self) -> None:
        super().__init__({"peername": ("10.0.0.9", 1), "sockname": ("10.0.0.1", 2)})
        self.written = bytearray()
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


@hostile("connections")
def test_nothing_breaks_and_nothing_is_left(data: bytes) -> None:
    bugs: list[dict[str, Any]] = []
    asyncio.run(spoken(data, bugs))
    assert bugs == []


async def spoken(data: bytes, bugs: list[dict[str, Any]]) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: bugs.append(context))
    app, _ = gateway(api_keys=("k",), trusted_proxies=("10.0.0.9",))
    others = asyncio.all_tasks()
    config = copy(_uvicorn(app, lambda: None).config)
    config.loaded_app = ProxyHeadersMiddleware(app, ["10.0.0.9"])
    kind = limited_protocol(app.config.connection, app.connections)
    protocol, wire = kind(config, ServerState(), {}, loop), Wire()
    protocol.connection_made(wire)
    for piece in data.split(b"|~|"):
        if not piece or wire.closed:
            break
        protocol.data_received(piece)
        await settled()
    await settled()
    protocol.connection_lost(None)
    await settled()
    for line in bytes(wire.written).split(b"\r\n"):
        assert not line.startswith(b"HTTP/1.1 5") or line[9:12] == b"503", line
    left = asyncio.all_tasks() - others
    for task in left:
        task.cancel()
    assert not left, left
    assert app._bodies.in_memory == 0
    assert all(engine.units == engine.host_bytes == 0 for engine in app.engines)
    assert not len(app.connections)


async def settled() -> None:
    for _ in range(TURNS):
        await asyncio.sleep(0)
