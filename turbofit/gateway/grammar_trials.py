"""Compiles each new grammar in a separate process, before an engine does.

XGrammar takes from a millisecond to minutes for a grammar, and the text of the grammar does not
tell how long. LMDeploy's server cannot end the compilation. So `grammar_process` tries the grammar
first, and a grammar that does not compile in time is refused.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

import msgspec

from turbofit.core.plan import GRAMMAR_TRIAL, Plan
from turbofit.core.process.interpreter import until_done
from turbofit.core.struct import JsonObject
from turbofit.core.units import MIB
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.grammars import grammar_of
from turbofit.gateway.limits.rules import refused

#: The most seconds of processor time for a grammar, of all threads together. A string of
#: ``maxLength`` 255 takes 8 s with a vocabulary of 151,643 (`bench/gateway/GRAMMARS.md`). XGrammar
#: uses up to eight threads.
SECONDS: Final = 15
#: The most seconds to wait for an answer: the process is ready after 4 to 9 s, and a trial may wait
#: for a core.
_ANSWER_SECONDS: Final = 180.0
#: The most grammars that are remembered.
_REMEMBERED: Final = 4096
#: Otherwise each thread of XGrammar would reserve far more address space than it uses, and the
#: trial would reach its limit of memory too early.
_ENVIRONMENT: Final = {"MALLOC_ARENA_MAX": "2"}


class GrammarTrials:
    """Tries the grammars of one gateway, one at a time; the first grammar starts the process.

    ``command`` starts `grammar_process`. If grammars cannot be tried, ``say`` is called once, and
    every grammar is passed on. But if XGrammar is missing and the engines are ``ours`` (they run in
    this Python's environment), every grammar is refused.
    """

    def __init__(
        self, command: Sequence[str], say: Callable[[str], object], *, ours: bool = True
    ) -> None:
        self._command, self._say, self._ours = command, say, ours
        #: Held during a trial.
        self._trial = asyncio.Lock()
        #: Held, by client, while a grammar of the client is on trial or waits.
        self._of_client: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        #: Why a known grammar is refused, or None; by the hash of the grammar, the oldest first.
        self._known: dict[bytes, str | None] = {}
        self._process: asyncio.subprocess.Process | None = None
        #: Why grammars cannot be tried, and the package that is missing.
        self._unable: dict[str, Any] | None = None

    async def check(self, body: JsonObject, who: str) -> None:
        """Try the grammar of a body, if it has a new grammar; ``who`` is the client of the body.

        Each client has at most one grammar that is on trial or waits for its trial. So a grammar
        waits for at most one trial of every other client.

        Raises:
            Refusal: the grammar was not compiled in time, XGrammar cannot compile the grammar, or
                XGrammar is missing.
        """
        grammar = grammar_of(body)
        if grammar is None:
            return
        field, given = grammar
        chat = msgspec.json.encode(given)  # names in another order make another grammar
        name = sha256(chat).digest()
        if self._unable is None and name not in self._known:
            async with self._of_client.setdefault(who, asyncio.Lock()):
                # A cancelled trial would end the process.
                await until_done(self._learn(name, chat))
        if self._ours and self._unable is not None and self._unable.get("lacks") == "xgrammar":
            raise Refusal("option_missing:xgrammar", param=field)
        if (why := self._known.get(name)) is not None:
            raise refused(field, why)

    async def end(self) -> None:
        """Kill the process if it runs; the next grammar starts a new process."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _learn(self, name: bytes, chat: bytes) -> None:
        """Try a grammar that is still unknown, and remember whether and why it is refused."""
        async with self._trial:
            if self._unable is not None or name in self._known:
                return
            try:
                self._known[name] = await self._try(chat)
            except BaseException:
                await self.end()  # nobody would read the answer of this trial
                raise
        if len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]

    async def _try(self, chat: bytes) -> str | None:
        """Return why a grammar is refused; None if an engine may compile the grammar."""
        if self._process is None:
            pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=pipe, stdout=pipe, stderr=nothing,
                env={**os.environ, **_ENVIRONMENT},
            )  # fmt: skip
            ready = await _answer(self._process)
            if "unable" in ready:
                self._unable = ready
                self._say(
                    "warning: grammars of response_format and tools cannot be tried before engines"
                    f" compile them, and an engine may compile for minutes: {ready['unable']}"
                )
                return None
        assert self._process.stdin is not None
        self._process.stdin.write(chat + b"\n")
        result = await _answer(self._process)
        if "wrong" in result:
            return f"cannot be compiled: {result['wrong']}"
        why = (
            f"was not compiled within {SECONDS} s of processor time and {GRAMMAR_TRIAL // MIB} MiB:"
            " shorten patterns and lengths, or require properties that are optional"
        )
        return why if result else None


async def _answer(process: asyncio.subprocess.Process) -> dict[str, Any]:
    """Return the next answer of the process.

    Raises:
        Refusal: the process has ended, or gives no answer in time.
    """
    assert process.stdout is not None
    with suppress(asyncio.TimeoutError, OSError, msgspec.MsgspecError):
        line = await asyncio.wait_for(process.stdout.readline(), _ANSWER_SECONDS)
        return msgspec.json.decode(line, type=dict[str, Any])
    raise Refusal("busy:grammar", retry_after=5)


def trials_of(
    plan: Plan, folder: str, options: Sequence[str], say: Callable[[str], object], *, ours: bool
) -> GrammarTrials | None:
    """Return the trials for a plan's engines; None if the engines compile no grammars.

    ``folder`` has the model's tokenizer; ``options`` are the options of LMDeploy's server.
    """
    if not plan.backend.of_lmdeploy:
        return None
    trust = "trust" if plan.model.needs_remote_code else "no"
    words = [word for option in options for word in option.split("=", 1)]
    command = (
        sys.executable, str(Path(__file__).with_name("grammar_process.py")), str(SECONDS),
        str(GRAMMAR_TRIAL), folder, trust, *words,
    )  # fmt: skip
    return GrammarTrials(command, say, ours=ours)
