"""Has LMDeploy's server compile grammars on threads, and say why it could not read a request.

LMDeploy parses and compiles a grammar on the event loop that answers everybody: for seconds nobody
gets a token. XGrammar keeps what it compiled, so here a thread does both first, and LMDeploy's own
call then finds the result. The process of LMDeploy's PyTorch engine, which compiles in its own
loop, is left as it is.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.process.imports import once_imported, unlike

if TYPE_CHECKING:
    from collections.abc import Callable

_MODULE: Final = "lmdeploy.serve.core.async_engine"
#: LMDeploy's functions that are called here, or whose order is relied on, and the first digits of
#: their sources' SHA-256 in 0.18.0.
_KNOWN: Final = {
    "AsyncEngine.preprocess": "d588f51ecea7",
    "ensure_response_format_compilable": "c859fec436d8",
    "compile_response_format": "78f464f15c69",
    "TurboMind.grammar_compiler": "1e6901d6e0fb",
    "TurboMindInstance.async_stream_infer": "2958a708152a",
}
#: The most grammars that are compiled at once; XGrammar takes up to eight threads for each.
_AT_ONCE: Final = 2
#: Bytes of compiled grammars that an engine keeps; LMDeploy itself sets no limit. A string of
#: ``maxLength`` 255 takes 4 MB.
_KEPT: Final = 256 << 20
#: The module of errors with which a chat template refuses a chat; their text is for its author.
_TEMPLATE_ERRORS: Final = "jinja2.exceptions"


def install() -> None:
    """Have the server that this process will run compile grammars on threads."""
    once_imported(_MODULE, _change)


def _change(module: Any) -> None:
    """Change ``AsyncEngine.preprocess`` of LMDeploy's module, if its code is the known one."""
    preprocess = module.AsyncEngine.preprocess
    why = unlike(preprocess, _KNOWN) or unlike(module.ensure_response_format_compilable, _KNOWN)
    if why is not None:
        _say(why)
        return
    threads = ThreadPoolExecutor(_AT_ONCE, "grammar")
    prepare = Compiler(module.ensure_response_format_compilable).prepare

    @wraps(preprocess)
    async def preprocess_here(engine: Any, *arguments: Any, **keywords: Any) -> Any:
        given = getattr(keywords.get("gen_config"), "response_format", None)
        if given is not None:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(threads, prepare, engine.engine, given)
        try:
            return await preprocess(engine, *arguments, **keywords)
        except module.RequestError as error:
            raise _with_reason(error) from error.__cause__

    module.AsyncEngine.preprocess = preprocess_here


def _with_reason(error: Any) -> Any:
    """Return LMDeploy's error with the reason that it hides, if this is one for clients."""
    cause = error.__cause__
    if type(cause).__module__ == _TEMPLATE_ERRORS:
        return type(error)(error.code, f"the model's chat template refuses the request: {cause}")
    if isinstance(cause, ImportError):
        return type(error)(error.code, f"the server lacks a package: {cause}")
    return error


class Compiler:
    """Parses and compiles grammars of a server; ``parse`` is LMDeploy's own check of a format."""

    def __init__(self, parse: Callable[[Any], object]) -> None:
        self._parse, self._lock = parse, threading.Lock()

    def prepare(self, engine: Any, given: Any) -> None:
        """Parse and compile a response format, so that LMDeploy's own calls find the results.

        An error is left to LMDeploy, whose own call meets it again.
        """
        with suppress(Exception):
            self._parse(given)
            turbomind = _turbomind() if type(engine).__name__ == "TurboMind" else None
            if turbomind is not None:
                with self._lock:
                    compiler = _compiler_of(engine, turbomind)
                turbomind.compile_response_format(compiler, given)


@cache
def _turbomind() -> Any:
    """Return the module of LMDeploy's TurboMind engine; None if its code is not the known one."""
    module = sys.modules["lmdeploy.turbomind.turbomind"]
    used = (
        module.TurboMind.grammar_compiler.fget,
        module.TurboMindInstance.async_stream_infer,
        module.compile_response_format,
    )
    for function in used:
        why = unlike(function, _KNOWN)
        if why is not None:
            _say(why)
            return None
    return module


def _compiler_of(engine: Any, turbomind: Any) -> Any:
    """Return the engine's compiler, which is made as LMDeploy makes it, but keeps a limit."""
    if engine._grammar_compiler is None:
        info = turbomind.TokenizerInfo.from_huggingface(
            engine.tokenizer.model.model, vocab_size=engine._vocab_size
        )
        engine._grammar_compiler = turbomind._tm.GrammarCompiler(info, max_memory_bytes=_KEPT)
    return engine._grammar_compiler


def _say(why: str) -> None:
    sys.stderr.write(f"turbofit: grammars: LMDeploy's own way: {why}\n")
