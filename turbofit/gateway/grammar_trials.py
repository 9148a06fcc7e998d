"""Compiles each grammar that was not seen yet, before an engine does, in a process of its own.

XGrammar takes from a millisecond to minutes for a grammar, which nobody can tell from its text, and
LMDeploy's server cannot end it. So `grammar_process` tries it first, and what it does not compile
in time is refused.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from contextlib import suppress
from hashlib import sha256
from importlib.util import find_spec
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakValueDictionary

import msgspec

from turbofit.core.plan import GRAMMAR_TRIAL
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.grammars import grammar_of
from turbofit.gateway.limits.rules import refused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.core.plan import Plan
    from turbofit.core.struct import JsonObject

#: Seconds that a grammar may take. A string of ``maxLength`` 255 takes 5 to 10 s on two busy cores
#: with a vocabulary of 151,643, and far less on more cores (`bench/gateway/GRAMMARS.md`).
SECONDS: Final = 15.0
#: Seconds until the process must be ready (4 to 9 are usual), and beyond a trial's own time.
_READY_SECONDS: Final = 120.0
_BEYOND_SECONDS: Final = 10.0
#: Grammars that are remembered, and seconds for which one stays refused: the host may have been
#: busy.
_REMEMBERED: Final = 4096
_REFUSED_SECONDS: Final = 300.0
_PIPE: Final = asyncio.subprocess.PIPE
_PROGRAM: Final = str(Path(__file__).with_name("grammar_process.py"))
#: The place in XGrammar's sources with which its messages begin.
_PLACE: Final = re.compile(r"^\[[\d:]+\] \S+: ")
#: Threads of XGrammar would reserve far more address space than they use.
_ENVIRONMENT: Final = {"MALLOC_ARENA_MAX": "2", "TOKENIZERS_PARALLELISM": "false"}
#: LMDeploy's options on which a tool's grammar depends.
_OPTIONS: Final = ("--tool-call-parser", "--reasoning-parser")
#: The architecture for whose tools LMDeploy compiles a grammar in every request.
_HARMONY: Final = "GptOssForCausalLM"
#: Seconds after which a client may try again where the process ended.
_RETRY_SECONDS: Final = 5
_SMALLER: Final = "shorten patterns and lengths, or require properties that are optional"
UNTRIED: Final = (
    "grammars of response_format and tools are not tried before an engine compiles them: {why};"
    " one that takes minutes holds up the engine"
)


class GrammarTrials:
    """Tries the grammars of one gateway, one at a time; the first one starts the process.

    ``command`` starts `grammar_process`, which gives a grammar ``seconds``. ``say`` is called once
    if grammars cannot be tried; then every one is passed on. ``missing``: the engines have no
    XGrammar. ``every_tool``: see `grammars.grammar_of`.
    """

    def __init__(
        self,
        command: Sequence[str],
        say: Callable[[str], object],
        *,
        missing: bool = False,
        every_tool: bool = False,
        seconds: float = SECONDS,
    ) -> None:
        self._command, self._say, self._seconds = command, say, seconds
        self._missing, self._every_tool = missing, every_tool
        self._turn = asyncio.Lock()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        #: Why a grammar is refused, or None, and until when this holds; by hash, the oldest first.
        self._known: dict[bytes, tuple[str | None, float]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._unable = False

    async def check(self, body: JsonObject, who: str) -> None:
        """Return if an engine may compile the grammar of a body; ``who`` is its client.

        A client has one grammar on trial or waiting for it, so that another client's waits for one
        trial of each client at most.

        Raises:
            Refusal: it was not compiled in time, XGrammar cannot compile it, or there is none.
        """
        grammar = grammar_of(body, every_tool=self._every_tool)
        if grammar is None:
            return
        if self._missing:
            raise Refusal("option_missing:xgrammar", param=grammar.field)
        chat = msgspec.json.encode(grammar.chat, order="deterministic")
        name = sha256(chat).digest()
        if not self._knows(name):
            async with self._turns.setdefault(who, asyncio.Lock()):
                trial = asyncio.ensure_future(self._learn(name, chat))
                try:
                    await asyncio.shield(trial)
                except asyncio.CancelledError:  # the process would have to be started anew
                    await asyncio.gather(trial, return_exceptions=True)
                    raise
        why, _ = self._known.get(name, (None, 0.0))
        if why is not None:
            raise refused(grammar.field, why)

    def end(self) -> asyncio.subprocess.Process | None:
        """Kill the process, and return it if there is one; the next grammar starts it anew."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
        return process

    def _knows(self, name: bytes) -> bool:
        _, until = self._known.get(name, (None, 0.0))
        return self._unable or time.monotonic() < until

    async def _learn(self, name: bytes, chat: bytes) -> None:
        """Try a grammar unless it is known meanwhile, and remember why it is refused, if it is."""
        async with self._turn:
            if self._knows(name):
                return
            try:
                why = await self._try(chat)
            except (asyncio.TimeoutError, OSError, msgspec.MsgspecError):
                self.end()
                raise Refusal("busy:grammar", retry_after=_RETRY_SECONDS) from None
            except BaseException:
                self.end()  # nobody will read its answer
                raise
        self._known.pop(name, None)
        while len(self._known) >= _REMEMBERED:
            del self._known[next(iter(self._known))]
        until = inf if why is None else time.monotonic() + _REFUSED_SECONDS
        self._known[name] = why, until

    async def _try(self, chat: bytes) -> str | None:
        """Return why a grammar is refused, or None."""
        process = self._process
        if process is None:
            process = self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=_PIPE, stdout=_PIPE, stderr=asyncio.subprocess.DEVNULL,
                env={**os.environ, **_ENVIRONMENT},
            )  # fmt: skip
            ready = await _answer(process, _READY_SECONDS)
            if "unable" in ready:
                self._unable = True
                self._known.clear()
                self._say(UNTRIED.format(why=ready["unable"]))
                self.end()
                return None
        assert process.stdin is not None
        process.stdin.write(chat + b"\n")
        said = await _answer(process, self._seconds + _BEYOND_SECONDS)
        if "wrong" in said:
            return f"cannot be compiled: {_PLACE.sub('', said['wrong']).strip()}"
        ended = said.get("signal")
        if ended == signal.SIGALRM:
            return f"was not compiled within {self._seconds:g} s: {_SMALLER}"
        return None if ended is None else f"ended the process that compiled it: {_SMALLER}"


async def _answer(process: asyncio.subprocess.Process, seconds: float) -> dict[str, Any]:
    """Return the next answer of the process; raise one of several errors if it gives none."""
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), seconds)
    return msgspec.json.decode(line, type=dict[str, Any])


def trials_of(
    plan: Plan, folder: str, options: Sequence[str], say: Callable[[str], object], *, ours: bool
) -> GrammarTrials | None:
    """Return the trials for a plan's engines; None if they compile no grammars, or none is tried.

    ``folder`` has the model's tokenizer, ``options`` are those of the engines' server. ``ours``:
    the engines run in this Python's environment.
    """
    if not plan.engine.of_lmdeploy:
        return None
    lacking = [name for name in ("lmdeploy", "xgrammar") if find_spec(name) is None]
    if not ours and (lacking or not Path(folder, "config.json").is_file()):
        say(UNTRIED.format(why=f"no {lacking[0]} here" if lacking else "no checkpoint here"))
        return None
    model, words = plan.model, [word for option in options for word in option.split("=", 1)]
    parsers = [
        word for option, value in pairwise(words) if option in _OPTIONS for word in (option, value)
    ]
    trust = "yes" if model.needs_remote_code else "no"
    return GrammarTrials(
        (sys.executable, _PROGRAM, str(SECONDS), str(GRAMMAR_TRIAL), folder, trust, *parsers),
        say,
        missing="xgrammar" in lacking,
        every_tool=model.architecture == _HARMONY,
    )
