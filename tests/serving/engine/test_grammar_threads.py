"""LMDeploy's server compiles grammars beside its event loop, and says why it read no request."""

from __future__ import annotations

import ast
import asyncio
import hashlib
import importlib.util
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.serving import needs
from tests.support.waiting import HANG
from turbofit.serving.engine import grammar_threads

GIVEN = {"type": "regex_schema", "regex_schema": "a"}
CONFIG = SimpleNamespace(response_format=GIVEN)


def test_every_function_on_which_it_relies_is_the_one_that_was_read():
    needs("lmdeploy")
    folder = Path(importlib.util.find_spec("lmdeploy").origin).parent
    files = ("serve/core/async_engine.py", "_guided_decoding.py", "turbomind/turbomind.py")
    found = {}
    for file in files:
        text = (folder / file).read_text(encoding="utf-8")
        found |= dict(sources(ast.parse(text).body, text.splitlines(keepends=True)))
    for name, digest in grammar_threads._KNOWN.items():
        assert hashlib.sha256(found[name].encode()).hexdigest().startswith(digest), name


def sources(body: list[ast.stmt], lines: list[str], before: str = ""):
    """The source of each function, as `inspect` gives it, by qualified name."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from sources(node.body, lines, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
            yield before + node.name, "".join(lines[first - 1 : node.end_lineno])


class RequestError(RuntimeError):
    """As LMDeploy's."""

    def __init__(self, code: str, message: str = "Request preprocessing failed.") -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Server:
    """An `AsyncEngine` of ours, with the module that it stands in, and an engine below it."""

    def __init__(self, monkeypatch, kind: str = "TurboMind", known: bool = True) -> None:
        self.where: dict[str, str] = {}
        self.error: Exception | None = None
        self.compiled = threading.Event()
        server = self

        class AsyncEngine:
            def __init__(self) -> None:
                self.engine = type(kind, (), {"_grammar_compiler": None, "_vocab_size": 9})()
                self.engine.tokenizer = SimpleNamespace(model=SimpleNamespace(model="words"))

            async def preprocess(self, messages: Any, **_: Any) -> Any:
                server.where["preprocess"] = threading.current_thread().name
                if server.error is not None:
                    raise RequestError("failed") from server.error
                return messages

        def compile_response_format(compiler: Any, given: Any) -> None:
            self.where["compile"] = threading.current_thread().name
            assert (compiler, given) == (("words", 9, 256 << 20), GIVEN)
            assert self.compiled.wait(HANG)

        def parse(given: Any) -> None:
            self.where["parse"] = threading.current_thread().name
            if given is not GIVEN:
                raise ValueError("no format")

        info = SimpleNamespace(from_huggingface=lambda words, vocab_size: (words, vocab_size))
        native = SimpleNamespace(
            GrammarCompiler=lambda made, max_memory_bytes: (*made, max_memory_bytes)
        )
        turbomind = SimpleNamespace(
            TokenizerInfo=info, _tm=native, compile_response_format=compile_response_format
        )
        monkeypatch.setattr(grammar_threads, "_turbomind", lambda: turbomind)
        if known:
            monkeypatch.setattr(grammar_threads, "unlike", lambda *_: None)
        self.module = SimpleNamespace(
            AsyncEngine=AsyncEngine, RequestError=RequestError,
            ensure_response_format_compilable=parse,
        )  # fmt: skip
        grammar_threads._change(self.module)
        self.engine = AsyncEngine()


def test_the_event_loop_goes_on_while_a_thread_compiles(monkeypatch):
    server = Server(monkeypatch)
    loop = threading.current_thread().name

    async def story():
        first = asyncio.ensure_future(server.engine.preprocess("a", gen_config=CONFIG))
        text = await server.engine.preprocess("b", gen_config=SimpleNamespace(response_format=None))
        assert text == "b"
        assert not first.done()
        server.compiled.set()
        assert await first == "a"

    asyncio.run(story())
    assert server.where["preprocess"] == loop
    assert loop not in (server.where["parse"], server.where["compile"])


def test_another_engine_s_formats_are_parsed_and_not_compiled(monkeypatch):
    server = Server(monkeypatch, "Engine")
    assert asyncio.run(server.engine.preprocess("a", gen_config=CONFIG)) == "a"
    assert "parse" in server.where
    assert "compile" not in server.where


def test_a_format_that_is_none_is_left_to_lmdeploy(monkeypatch):
    server = Server(monkeypatch)
    config = SimpleNamespace(response_format={"type": "nothing"})
    assert asyncio.run(server.engine.preprocess("a", gen_config=config)) == "a"


def test_code_that_was_not_read_stays_as_lmdeploy_has_it(monkeypatch, capfd):
    server = Server(monkeypatch, known=False)
    server.compiled.set()
    assert asyncio.run(server.engine.preprocess("a", gen_config=CONFIG)) == "a"
    assert set(server.where) == {"preprocess"}
    assert "LMDeploy's own way" in capfd.readouterr().err


def template_error() -> Exception:
    return pytest.importorskip("jinja2").exceptions.TemplateError("roles must alternate")


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (ModuleNotFoundError("No module named 'xgrammar'"), "failed. No module named 'xgrammar'"),
        (template_error(), "failed. roles must alternate"),
        (KeyError("/secret/path"), "Request preprocessing failed."),
        (None, "Request preprocessing failed."),
    ],
)
def test_a_reason_that_lmdeploy_hides_is_said_where_it_is_the_client_s(monkeypatch, cause, message):
    server = Server(monkeypatch)
    server.error = cause or OSError("a file")
    with pytest.raises(RequestError) as caught:
        asyncio.run(server.engine.preprocess("a"))
    assert caught.value.code == "failed"
    assert str(caught.value).endswith(message)
