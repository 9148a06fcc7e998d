"""Compiles grammars for trial: each in a fork of this process, which the kernel ends in time.

``python grammar_process.py SECONDS BYTES FOLDER TRUST [OPTION VALUE]…`` loads a model's tokenizer,
and LMDeploy's parsers that the options name (``--tool-call-parser``, ``--reasoning-parser``). It
answers with a line of JSON: ``{}``, or ``{"unable": why}`` and its end. Then each line of its input
is a chat, whose grammar it compiles, and each answer one of these:

- ``{}``: it was compiled, or LMDeploy compiles nothing for it;
- ``{"wrong": text}``: XGrammar cannot compile it;
- ``{"signal": number}``: the fork was ended, by SIGALRM after ``SECONDS``.

A fork may take ``BYTES`` of host memory more than this process. This program imports nothing of
turbofit.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: How much less processor time than others the forks get: the engines run beside them.
_NICE = 10
_MOST_SAID = 500
#: LMDeploy's parser of whole answers for this architecture; all others have ``default``.
#: lmdeploy lmdeploy/serve/openai/api_server.py::set_parsers #14c093
_HARMONY = {"GptOssForCausalLM": "gpt-oss"}


def compiler_of(folder: str, trust: bool, options: dict[str, str]) -> Callable[[Any], object]:
    """Return a function that compiles the grammar of a chat as LMDeploy's server does.

    Its XGrammar is Python's, which LMDeploy's server parses with; TurboMind has one built in.
    """
    import xgrammar
    from lmdeploy._guided_decoding import compile_response_format, get_interns1_encoded_vocab
    from lmdeploy.serve.openai.protocol import ChatCompletionRequest
    from lmdeploy.serve.parsers import ResponseParserManager
    from lmdeploy.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder, trust_remote_code=trust).model.model
    if type(tokenizer).__name__ == "InternS1Tokenizer":
        words = get_interns1_encoded_vocab(tokenizer, len(tokenizer))
        info = xgrammar.TokenizerInfo(words, stop_token_ids=[tokenizer.eos_token_id])
    else:
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer)
    compiler = xgrammar.GrammarCompiler(info, cache_enabled=False)
    config = json.loads(Path(folder, "config.json").read_text("utf-8"))
    architecture = (config.get("architectures") or [""])[0]
    default = ResponseParserManager.get("default")
    parser = ResponseParserManager.get(_HARMONY.get(architecture, "default")) or default
    parser.set_parsers(
        reasoning_parser_name=options.get("--reasoning-parser"),
        tool_parser_name=options.get("--tool-call-parser"), tokenizer=tokenizer,
    )  # fmt: skip

    def compile_of(chat: Any) -> None:
        try:
            request = parser(ChatCompletionRequest(model="", messages=[], **chat)).request
        except (TypeError, ValueError):
            return  # LMDeploy refuses it, in its own words, before it compiles anything
        if request.response_format is not None:
            compile_response_format(compiler, request.response_format)

    return compile_of


def attempt(compile_of: Callable[[Any], object], line: bytes, seconds: float, most: int) -> Any:
    """Compile a chat's grammar in a fork; return the answer, None if the fork has written it."""
    fork = os.fork()
    if fork == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        os.nice(_NICE)
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        bound = pages * resource.getpagesize() + most
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
        said = {}
        try:
            compile_of(json.loads(line))
        except BaseException as exc:  # noqa: BLE001 - whatever ends it, the client is told
            said = {"wrong": (str(exc) or type(exc).__name__)[:_MOST_SAID]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        answer(said)
        os._exit(0)
    _, status = os.waitpid(fork, 0)
    return {"signal": os.WTERMSIG(status)} if os.WIFSIGNALED(status) else None


def answer(said: Any) -> None:
    os.write(_ANSWERS, json.dumps(said).encode() + b"\n")


def main() -> None:
    seconds, most, folder, trust, *options = sys.argv[1:]
    named = dict(zip(options[::2], options[1::2], strict=True))
    try:
        compile_of = compiler_of(folder, trust == "yes", named)
    except Exception as exc:  # noqa: BLE001 - a model's own code may raise anything
        answer({"unable": f"{type(exc).__name__}: {exc}"[:_MOST_SAID]})
        return
    answer({})
    for line in sys.stdin.buffer:
        said = attempt(compile_of, line, float(seconds), int(most))
        if said is not None:
            answer(said)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _ANSWERS = os.dup(1)
    os.dup2(2, 1)  # what packages print is no answer
    del sys.path[0]  # this folder, whose ``http`` would be taken for Python's
    main()
