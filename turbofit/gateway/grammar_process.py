"""Compiles grammars on trial, each in a fork of this process; the kernel ends a fork in time.

``python grammar_process.py SECONDS BYTES FOLDER TRUST [OPTION…]`` loads a model's tokenizer, and
the parsers that LMDeploy's options name. The first answer is a line of JSON: ``{}``, or
``{"unable": why, "lacks": package}``, after which the process ends. Then each line of input is a
chat. The process compiles the grammar of the chat, and answers with a line of JSON:

- ``{}``: the grammar was compiled and followed for some tokens, or LMDeploy compiles no grammar for
  this chat;
- ``{"wrong": text}``: XGrammar cannot compile the grammar;
- ``{"ended": signal}``: the fork took more than ``SECONDS`` of processor time, or more than
  ``BYTES`` of host memory in addition to this process. The signal is 0 if a library exits, as glibc
  does if it has no memory for a thread's data.

This program imports nothing of turbofit.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

#: The most seconds of a fork's life; it may wait for a core for most of them.
_LONGEST = 240
#: The number of tokens for which each compiled grammar is followed.
_FOLLOWED = 32
#: The most characters of an error in an answer.
_TOLD = 500


def compiler_of(folder: str, trust: str, options: Sequence[str]) -> Callable[[Any], object]:
    """Return a function that compiles and follows a chat's grammar as LMDeploy's server does.

    The function uses the Python package xgrammar, as LMDeploy's server does; TurboMind itself
    compiles with its own copy of XGrammar.
    """
    import xgrammar
    from lmdeploy._guided_decoding import compile_response_format
    from lmdeploy.serve.openai.protocol import ChatCompletionRequest
    from lmdeploy.serve.parsers import ResponseParserManager
    from lmdeploy.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder, trust_remote_code=trust == "trust").model.model
    compiler = xgrammar.GrammarCompiler(
        xgrammar.TokenizerInfo.from_huggingface(tokenizer), cache_enabled=False
    )
    given = dict(pairwise(options))
    parser = ResponseParserManager.get("default")
    parser.set_parsers(given.get("--reasoning-parser"), given.get("--tool-call-parser"), tokenizer)

    def compile_of(chat: Any) -> None:
        try:
            request = parser(ChatCompletionRequest(model="", messages=[], **chat)).request
        except (TypeError, ValueError):
            return  # LMDeploy refuses the request before it compiles anything
        if request.response_format is not None:
            follow(compile_response_format(compiler, request.response_format))

    return compile_of


def follow(grammar: Any) -> None:
    """Choose the first tokens of an answer by a compiled grammar, as an engine does.

    Before each token XGrammar computes the allowed tokens, while all clients of the engine wait.
    With ``(.{1,32}){1,31}`` this takes minutes, although the grammar compiles in a second.
    """
    import numpy as np
    import xgrammar

    matcher, chance = xgrammar.GrammarMatcher(grammar), random.Random(1)
    mask = xgrammar.allocate_token_bitmask(1, grammar.tokenizer_info.vocab_size)
    for _ in range(_FOLLOWED):
        matcher.fill_next_token_bitmask(mask)
        bits = np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")
        matcher.accept_token(int(chance.choice(bits.nonzero()[0])))
        if matcher.is_terminated():
            return


def attempt(compile_of: Callable[[Any], object], chat: bytes, seconds: int, most: int) -> None:
    """Compile a chat's grammar in a fork, and write the answer.

    The fork may take ``seconds`` of processor time, and ``most`` bytes more of host memory than
    this process.
    """
    fork = os.fork()
    if fork == 0:
        os.nice(5)  # engines get the cores first
        signal.alarm(_LONGEST)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        taken = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + most, taken + most))
        result = {}
        try:
            compile_of(json.loads(chat))
        except BaseException as exc:  # noqa: BLE001 - the client hears of every error
            # XGrammar's messages begin with a time and a place in its sources.
            text = re.sub(r"^\[[\d:]+\] \S+ ", "", str(exc).strip()) or type(exc).__name__
            result = {"wrong": text[:_TOLD]}
        # If the limit of time ended the fork after its answer, a second answer would follow, below.
        signal.signal(signal.SIGXCPU, signal.SIG_IGN)
        answer(result)
        os._exit(0)
    _, status = os.waitpid(fork, 0)
    if status:
        answer({"ended": os.WTERMSIG(status)})


def answer(result: Any) -> None:
    os.write(_ANSWERS, json.dumps(result).encode() + b"\n")


def main(seconds: str, most: str, folder: str, trust: str, *options: str) -> None:
    try:
        compile_of = compiler_of(folder, trust, options)
    except Exception as exc:  # noqa: BLE001 - a model's own code may raise anything
        lacks = exc.name if isinstance(exc, ImportError) else None
        answer({"unable": f"{type(exc).__name__}: {exc}"[:_TOLD], "lacks": lacks})
        return
    answer({})
    for chat in sys.stdin.buffer:
        attempt(compile_of, chat, int(seconds), int(most))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _ANSWERS = os.dup(1)
    os.dup2(2, 1)  # packages may print to stdout; such lines are no answers
    # The first entry is this folder, whose package ``http`` would hide Python's own.
    del sys.path[0]
    main(*sys.argv[1:])
