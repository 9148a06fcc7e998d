"""Has LMDeploy's server compile grammars on threads, and give reasons for unreadable requests.

LMDeploy parses and compiles a grammar on the event loop of all requests, and nobody gets a token
for seconds. XGrammar keeps compiled grammars. So a thread parses and compiles here first, and
LMDeploy's own call finds the result. LMDeploy's PyTorch engine compiles in another loop: only the
parsing is done here.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from typing import Any, Final

from turbofit.core.process.imports import once_imported, unlike

_MODULE: Final = "lmdeploy.serve.core.async_engine"
#: LMDeploy's functions whose code this module relies on, and the first digits of their sources'
#: SHA-256 in 0.18.0.
_KNOWN: Final = {
    "AsyncEngine.preprocess": "d588f51ecea7",
    "ensure_response_format_compilable": "c859fec436d8",
    "compile_response_format": "78f464f15c69",
    "TurboMind.grammar_compiler": "1e6901d6e0fb",
    "TurboMindInstance.async_stream_infer": "2958a708152a",
}
#: Bytes of compiled grammars that an engine keeps; LMDeploy itself sets no limit. A string of
#: ``maxLength`` 255 takes 4 MB.
_KEPT: Final = 256 << 20
_LOCK: Final = threading.Lock()


def install() -> None:
    """Have this process's server compile grammars on threads."""
    once_imported(_MODULE, _change)


def _change(module: Any) -> None:
    """Change ``AsyncEngine.preprocess`` of LMDeploy's module if its code is known."""
    preprocess, parse = module.AsyncEngine.preprocess, module.ensure_response_format_compilable
    if not _are_known(preprocess, parse):
        return

    @wraps(preprocess)
    async def preprocess_here(engine: Any, *arguments: Any, **keywords: Any) -> Any:
        """Compile the request's grammar on a thread, then preprocess as LMDeploy does."""
        given = getattr(keywords.get("gen_config"), "response_format", None)
        if given is not None:
            await asyncio.to_thread(_prepare, parse, engine.engine, given)
        try:
            return await preprocess(engine, *arguments, **keywords)
        except module.RequestError as error:
            raise _with_reason(error) from error.__cause__

    module.AsyncEngine.preprocess = preprocess_here


def _with_reason(error: Any) -> Any:
    """Return LMDeploy's error with its hidden reason, if the reason is for clients.

    Such a reason is a chat template's refusal or a missing package.
    """
    cause = error.__cause__
    if isinstance(cause, ImportError) or type(cause).__module__ == "jinja2.exceptions":
        return type(error)(error.code, f"{error.message} {cause}")
    return error


def _prepare(parse: Callable[[Any], object], engine: Any, given: Any) -> None:
    """Parse and compile a response format, so that LMDeploy's own calls find the results.

    Errors are ignored here; LMDeploy's own call raises an error again.
    """
    with suppress(Exception):
        parse(given)
        if type(engine).__name__ == "TurboMind" and (turbomind := _turbomind()) is not None:
            with _LOCK:  # the engine's compiler is made as LMDeploy does, but with a limit
                if engine._grammar_compiler is None:
                    info = turbomind.TokenizerInfo.from_huggingface(
                        engine.tokenizer.model.model, vocab_size=engine._vocab_size
                    )
                    compiler = turbomind._tm.GrammarCompiler(info, max_memory_bytes=_KEPT)
                    engine._grammar_compiler = compiler
            turbomind.compile_response_format(engine._grammar_compiler, given)


@cache
def _turbomind() -> Any:
    """Return the module of LMDeploy's TurboMind engine; None if the code is unknown."""
    module = sys.modules["lmdeploy.turbomind.turbomind"]
    known = _are_known(
        module.TurboMindInstance.async_stream_infer, module.TurboMind.grammar_compiler.fget,
        module.compile_response_format,
    )  # fmt: skip
    return module if known else None


def _are_known(*functions: Any) -> bool:
    """Return whether functions of LMDeploy have their known code; log an unknown function."""
    if why := [text for function in functions if (text := unlike(function, _KNOWN))]:
        sys.stderr.write(f"turbofit: grammars: LMDeploy's own way: {why[0]}\n")
    return not why
