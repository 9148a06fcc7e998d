"""LMDeploy's server tells the first tokens of requests that have a name."""

from __future__ import annotations

import ast
import asyncio
import hashlib
import importlib.util
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.serving.engine.test_grammar_threads import sources
from tests.support.serving import needs
from tests.support.waiting import auntil
from turbofit.core.messages import EXCHANGE, FIRST_TOKENS
from turbofit.serving.engine import first_tokens


def test_the_functions_on_which_it_relies_are_the_ones_that_were_read():
    needs("lmdeploy")
    folder = Path(importlib.util.find_spec("lmdeploy").origin).parent / "serve"
    found = {}
    for file in ("openai/api_server.py", "core/async_engine.py"):
        text = (folder / file).read_text(encoding="utf-8")
        found |= dict(sources(ast.parse(text).body, text.splitlines(keepends=True)))
    for name, digest in first_tokens._KNOWN.items():
        assert hashlib.sha256(found[name].encode()).hexdigest().startswith(digest), name


class Server:
    """A server of ours in place of LMDeploy's: its app answers with the parts of ``generate``."""

    def __init__(self, monkeypatch, *, known: bool = True) -> None:
        self.parts: asyncio.Queue[Any] = asyncio.Queue()
        self.closed = 0
        server = self

        class AsyncEngine:
            async def generate(self, request: Any, stream_response: bool = True):
                try:
                    while (part := await server.parts.get()) is not None:
                        yield part
                finally:
                    server.closed += 1

        class FastAPI:
            def __init__(self) -> None:
                self.app = self.handle

            def add_middleware(self, made: Any) -> None:
                self.app = made(self.app)

            async def handle(self, scope: Any, receive: Any, send: Any) -> None:
                answer = AsyncEngine().generate("request")
                scope["answer"] = [part async for part in answer]

        if known:
            monkeypatch.setattr(first_tokens, "unlike", lambda *_: None)
        module = SimpleNamespace(AsyncEngine=AsyncEngine, FastAPI=FastAPI, serve=lambda: None)
        first_tokens._change(module)
        self.app = module.FastAPI().app

    def ask(self, name: str = "") -> tuple[dict, asyncio.Task]:
        headers = [(EXCHANGE.encode(), name.encode())] if name else []
        scope = {"type": "http", "path": "/v1/completions", "headers": headers}
        return scope, asyncio.ensure_future(self.app(scope, None, None))

    @asynccontextmanager
    async def page(self):
        """The lines of an open page of first tokens."""
        lines, gone = [], asyncio.Event()

        async def receive():
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            lines.append(message.get("body", b"").decode().strip())

        reading = asyncio.ensure_future(
            self.app({"type": "http", "path": FIRST_TOKENS, "headers": []}, receive, send)
        )
        await auntil(lambda: lines == ["", ""], "the head")
        yield lines
        gone.set()
        await reading
        assert not first_tokens._PAGES


def part(tokens: int) -> SimpleNamespace:
    return SimpleNamespace(generate_token_len=tokens, input_token_len=30)


async def test_a_name_is_told_once_at_the_first_token_and_the_answer_is_what_it_was(monkeypatch):
    server = Server(monkeypatch)
    async with server.page() as lines:
        scope, asked = server.ask("7-1")
        parts = [part(0), part(1), part(2)]
        server.parts.put_nowait(parts[0])
        await auntil(server.parts.empty, "a part without a token")
        assert lines == ["", ""]
        for one in (*parts[1:], None):
            server.parts.put_nowait(one)
        await asked
        await auntil(lambda: lines == ["", "", "7-1 30"], "the name")
    assert scope["answer"] == parts
    assert server.closed == 1


async def test_a_request_without_a_name_is_not_told(monkeypatch):
    server = Server(monkeypatch)
    async with server.page() as lines:
        for name in ("", "8"):
            server.parts.put_nowait(part(1))
            server.parts.put_nowait(None)
            await server.ask(name)[1]
        await auntil(lambda: lines == ["", "", "8 30"], "the name")


async def test_a_request_that_is_cancelled_ends_in_the_engine(monkeypatch):
    server = Server(monkeypatch)
    _, asked = server.ask("9")
    server.parts.put_nowait(part(1))
    await auntil(server.parts.empty, "a part")
    asked.cancel()
    with suppress(asyncio.CancelledError):
        await asked
    assert server.closed == 1


def test_code_that_was_not_read_stays_as_lmdeploy_has_it(monkeypatch, capfd):
    server = Server(monkeypatch, known=False)
    assert not isinstance(server.app, first_tokens._FirstTokens)
    assert "first tokens are not told" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
async def test_other_scopes_pass(monkeypatch, kind):
    server = Server(monkeypatch)
    server.parts.put_nowait(None)
    await server.app({"type": kind, "headers": []}, None, None)
