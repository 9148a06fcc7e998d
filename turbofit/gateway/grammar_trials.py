"""Compiles each grammar that was not seen yet, before an engine does, in a process of its own.

XGrammar takes from a millisecond to minutes for a grammar, which nobody can tell from its text, and
LMDeploy's server cannot end it. So `grammar_process` tries it first, and what it does not compile
in time is refused.
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

#: Seconds of processor time that a grammar may take, of all threads together: a busy host makes
#: them no more. A string of ``maxLength`` 255 takes 8 with a vocabulary of 151,643
#: (`bench/gateway/GRAMMARS.md`); XGrammar shares them among up to eight threads.
SECONDS: Final = 15
#: Seconds for an answer: the process is ready after 4 to 9, a trial may wait for busy cores.
_ANSWER_SECONDS: Final = 180.0
#: The most grammars that are remembered.
_REMEMBERED: Final = 4096
#: Threads of XGrammar would reserve far more address space than they use.
_ENVIRONMENT: Final = {"MALLOC_ARENA_MAX": "2"}


class GrammarTrials:
    """Tries the grammars of one gateway, one at a time; the first one starts the process.

    ``command`` starts `grammar_process`. ``say`` is called once if grammars cannot be tried; then
    each is passed on. But where XGrammar is missing and the engines are ``ours``, which run in this
    Python's environment, each is refused.
    """

    def __init__(
        self, command: Sequence[str], say: Callable[[str], object], *, ours: bool = True
    ) -> None:
        self._command, self._say, self._ours = command, say, ours
        self._turn = asyncio.Lock()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        #: Why a grammar is refused, or None; by hash, the oldest first.
        self._known: dict[bytes, str | None] = {}
        self._process: asyncio.subprocess.Process | None = None
        #: Why grammars cannot be tried, and the package that is missing.
        self._unable: dict[str, Any] | None = None

    async def check(self, body: JsonObject, who: str) -> None:
        """Return if an engine may compile the grammar of a body; ``who`` is its client.

        A client has one grammar on trial or waiting for it, so that another client's waits for one
        trial of each client at most.

        Raises:
            Refusal: it was not compiled in time, XGrammar cannot compile it, or there is none.
        """
        grammar = grammar_of(body)
        if grammar is None:
            return
        field, given = grammar
        chat = msgspec.json.encode(given)  # in its order, which grammars keep
        name = sha256(chat).digest()
        if self._unable is None and name not in self._known:
            async with self._turns.setdefault(who, asyncio.Lock()):
                # A trial that is broken off would cost the process.
                await until_done(self._learn(name, chat))
        if self._ours and self._unable is not None and self._unable.get("lacks") == "xgrammar":
            raise Refusal("option_missing:xgrammar", param=field)
        if (why := self._known.get(name)) is not None:
            raise refused(field, why)

    async def end(self) -> None:
        """Kill the process, if there is one; the next grammar starts it anew."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _learn(self, name: bytes, chat: bytes) -> None:
        """Try a grammar unless it is known meanwhile, and remember why it is refused, if it is."""
        async with self._turn:
            if self._unable is not None or name in self._known:
                return
            try:
                self._known[name] = await self._try(chat)
            except BaseException:
                await self.end()  # nobody will read its answer
                raise
        if len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]

    async def _try(self, chat: bytes) -> str | None:
        """Return why a grammar is refused, or None."""
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
                    "warning: no grammar of response_format and tools is tried before an engine"
                    f" compiles it, which may take minutes: {ready['unable']}"
                )
                return None
        assert self._process.stdin is not None
        self._process.stdin.write(chat + b"\n")
        said = await _answer(self._process)
        if "wrong" in said:
            return f"cannot be compiled: {said['wrong']}"
        why = (
            f"was not compiled within {SECONDS} s of processor time and {GRAMMAR_TRIAL // MIB} MiB:"
            " shorten patterns and lengths, or require properties that are optional"
        )
        return why if said else None


async def _answer(process: asyncio.subprocess.Process) -> dict[str, Any]:
    """Return the next answer of the process.

    Raises:
        Refusal: it has ended, or gives none in time.
    """
    assert process.stdout is not None
    with suppress(asyncio.TimeoutError, OSError, msgspec.MsgspecError):
        line = await asyncio.wait_for(process.stdout.readline(), _ANSWER_SECONDS)
        return msgspec.json.decode(line, type=dict[str, Any])
    raise Refusal("busy:grammar", retry_after=5)


def trials_of(
    plan: Plan, folder: str, options: Sequence[str], say: Callable[[str], object], *, ours: bool
) -> GrammarTrials | None:
    """Return the trials for a plan's engines; None if they compile no grammars.

    ``folder`` has the model's tokenizer, ``options`` are those of the engines' server.
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
