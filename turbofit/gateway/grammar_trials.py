"""Tries each new grammar in a separate process, before an engine compiles and follows it.

XGrammar takes from a millisecond to minutes to compile a grammar, and as long for a token of its
answer; the text of the grammar does not tell how long. LMDeploy's server can end neither, and all
clients of the engine wait for a token. So `grammar_process` tries the grammar first. A grammar that
takes too long is refused; of any other the price is remembered, the seconds of its dearest token.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

import msgspec

from turbofit.core.plan import GRAMMAR_TRIAL, Plan
from turbofit.core.struct import JsonObject
from turbofit.core.units import MIB
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.grammars import grammar_of
from turbofit.gateway.limits.rules import refused

#: The most seconds of processor time for a grammar, of all threads together: XGrammar uses up to
#: eight. Of what people write, three strings of ``maxLength`` 255, 255 and 100 take longest: 8 s on
#: fast cores, 17 s on slow ones that others use too (`bench/gateway/GRAMMARS.md`). A usual grammar
#: that waits behind such a trial is still tried within `_WAIT_SECONDS`.
SECONDS: Final = 25
#: The seconds of a grammar's first trial. Ordinary grammars take less than this, so they wait for
#: no long trial that has not begun yet.
_SHORT: Final = 1
#: The most seconds of processor time for a token. Of what people write, three strings of
#: ``maxLength`` 255 are dearest: 0.04 s, on a slow host 0.09 s, where a token may be too long for
#: the rest of a string. The cheapest of the nested repetitions takes 0.17 s, on the slow host 0.8;
#: most take seconds (`bench/gateway/GRAMMARS.md`).
TOKEN_SECONDS: Final = 0.15
#: A token that takes less than this counts as nothing: an engine's step takes ten times as long.
_FREE: Final = 0.002
#: The most seconds that a request waits for the trial of its grammar.
_WAIT_SECONDS: Final = 30.0
#: The most seconds to wait for an answer of the process, which may wait for a core.
_ANSWER_SECONDS: Final = 300.0
_RETRY: Final = 5
#: The most grammars that are remembered.
_REMEMBERED: Final = 4096
#: Seconds for which a grammar is refused that held up an engine.
_HOUR: Final = 3600.0
#: Otherwise each thread of XGrammar would reserve far more address space than it uses, and the
#: trial would reach its limit of memory too early.
_ENVIRONMENT: Final = {"MALLOC_ARENA_MAX": "2"}
_SHORTEN: Final = "shorten patterns and lengths, or require properties that are optional"
#: Why a grammar is refused, by what its trial took too much of.
_WHY: Final = {
    "token": (
        f"takes more than {TOKEN_SECONDS} s of processor time for a token, while all clients wait:"
        f" repeat no part that repeats itself, and {_SHORTEN}"
    ),
    **dict.fromkeys(
        ("time", "memory"),
        f"was not compiled within {SECONDS} s of processor time and {GRAMMAR_TRIAL // MIB} MiB:"
        f" {_SHORTEN}",
    ),
}


@dataclass(frozen=True)
class Grammar:
    """A grammar that was tried, or may not be tried.

    ``price`` is the seconds of processor time of its dearest token, 0 for a usual one. ``field`` is
    the field of the request, ``why`` why the grammar is refused until ``until``, a time of
    `time.monotonic`.
    """

    name: bytes
    chat: JsonObject
    field: str
    price: float = 0.0
    why: str | None = None
    until: float = float("inf")

    @property
    def refusal(self) -> Refusal | None:
        return None if self.why is None else refused(self.field, self.why)


@dataclass(eq=False)
class _Trial:
    """A grammar on trial, or waiting for its trial, with the number of requests that wait for it.

    ``said`` is the text of an answer that is followed first. ``kept``: a request has waited in
    vain, and will come again. ``stopped``: the process was told to stop the trial.
    """

    grammar: Grammar
    done: asyncio.Future[Grammar]
    said: str = ""
    seconds: float = _SHORT
    requests: int = 0
    kept: bool = False
    stopped: bool = False

    @property
    def wanted(self) -> bool:
        return self.requests > 0 or self.kept


class GrammarTrials:
    """Tries the grammars of one gateway, one at a time.

    ``command`` starts `grammar_process`. If grammars cannot be tried, ``say`` is called once, and
    every grammar is passed on. But if XGrammar is missing and the engines are ``ours`` (they run in
    this Python's environment), every grammar is refused.
    """

    def __init__(
        self, command: Sequence[str], say: Callable[[str], object], *, ours: bool = True
    ) -> None:
        self._command, self._say, self._ours = command, say, ours
        #: Held, by client, while a grammar of the client is on trial or waits.
        self._of_client: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        #: The known grammars by their names, the oldest first.
        self._known: dict[bytes, Grammar] = {}
        #: The grammars on trial, or waiting, by their names.
        self._trials: dict[bytes, _Trial] = {}
        #: The trials that wait, in order of arrival; short ones are taken before long ones.
        self._queue: list[_Trial] = []
        self._running: _Trial | None = None
        self._worker: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        #: Held while the process starts.
        self._start = asyncio.Lock()
        #: Why grammars cannot be tried, and the package that is missing.
        self._unable: dict[str, Any] | None = None

    async def check(self, body: JsonObject, who: str) -> Grammar | None:
        """Try the grammar of a body if it is new; return it, or None if the body has none.

        ``who`` is the client of the body. Each client has at most one grammar that is on trial or
        waits for its trial.

        Raises:
            Refusal: the grammar takes too long, XGrammar cannot compile the grammar, XGrammar is
                missing, or the trial had no end in time (503).
        """
        found = grammar_of(body)
        if found is None:
            return None
        field_name, given = found
        # Names in another order make another grammar.
        name = sha256(msgspec.json.encode(given)).digest()
        grammar = Grammar(name, given, field_name)
        if self._unable is None:
            if self._known_now(name) is None:
                await self._learn(grammar, who)
            grammar = self._known_now(name) or grammar
        if self._ours and self._unable is not None and self._unable.get("lacks") == "xgrammar":
            raise Refusal("option_missing:xgrammar", param=field_name)
        if grammar.why is not None:
            raise refused(field_name, grammar.why)
        return grammar

    async def look_again(self, grammar: Grammar, said: str) -> Grammar | None:
        """Try a grammar again, along the text of an answer during which its engine was held up.

        Return the grammar as it is now known: refused for an hour if a token is dear in this text,
        measured alone and by processor time. None if nothing was found out.
        """
        if self._unable is not None or grammar.name in self._trials:
            return None
        trial = self._add(grammar, said, SECONDS)
        trial.kept = True
        with suppress(Refusal):
            return await asyncio.shield(trial.done)
        return None

    async def start(self) -> None:
        """Start the process, so that the first grammar need not wait for it."""
        with suppress(Refusal, OSError, EOFError):
            await self._ready()

    async def end(self) -> None:
        """Kill the process if it runs; the next grammar starts a new process."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait({self._worker})
        await self._kill()

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _known_now(self, name: bytes) -> Grammar | None:
        known = self._known.get(name)
        if known is not None and known.until < time.monotonic():
            del self._known[name]
            return None
        return known

    async def _learn(self, grammar: Grammar, who: str) -> None:
        """Wait until a grammar is known.

        Raises:
            Refusal: this took too long, or the trial failed.
        """
        mine = self._of_client.setdefault(who, asyncio.Lock())
        until = time.monotonic() + _WAIT_SECONDS
        # `wait_for` may swallow a cancellation that comes together with the result.
        turn = asyncio.ensure_future(mine.acquire())
        try:
            await asyncio.wait({turn}, timeout=_WAIT_SECONDS)
            if not turn.done():
                raise Refusal("busy:grammar", retry_after=_RETRY)
            if self._known_now(grammar.name) is None and self._unable is None:
                await self._wait(self._add(grammar), until)
        finally:
            if turn.done():
                mine.release()
            else:
                turn.cancel()

    async def _wait(self, trial: _Trial, until: float) -> None:
        """Wait until the trial has ended; a trial for which nobody waits is dropped."""
        trial.requests += 1
        try:
            left = until - time.monotonic()
            done, _ = await asyncio.wait({trial.done}, timeout=left)
            if not done:
                # What runs goes on: the client will come again.
                trial.kept = trial.kept or trial is self._running
                raise Refusal("busy:grammar", retry_after=_RETRY)
            trial.done.result()
        finally:
            trial.requests -= 1
            if not trial.wanted and trial in self._queue:
                self._queue.remove(trial)
                self._forget(trial)
            self._stop_unwanted()

    def _add(self, grammar: Grammar, said: str = "", seconds: float = _SHORT) -> _Trial:
        """Return the trial of a grammar; begin a new one if there is none."""
        trial = self._trials.get(grammar.name)
        if trial is None:
            done = asyncio.get_running_loop().create_future()
            trial = _Trial(grammar, done, said, seconds)
            self._trials[grammar.name] = trial
            self._queue.append(trial)
            self._stop_unwanted()
            if self._worker is None or self._worker.done():
                self._worker = asyncio.ensure_future(self._work())
        return trial

    def _stop_unwanted(self) -> None:
        """Stop the running trial if other trials wait, and nobody waits for this one."""
        running, process = self._running, self._process
        if running is None or running.wanted or running.stopped or not self._queue:
            return
        if process is not None and process.stdin is not None:
            process.stdin.write(b"\n")
            running.stopped = True

    def _forget(self, trial: _Trial) -> None:
        self._trials.pop(trial.grammar.name, None)
        if not trial.done.done():
            trial.done.cancel()

    async def _work(self) -> None:
        """Try the grammars that wait, until none waits."""
        while self._queue:
            trial = self._running = min(self._queue, key=lambda trial: trial.seconds)
            self._queue.remove(trial)
            try:
                result = await self._try(trial)
            except BaseException as exc:
                await self._kill()  # nobody would read the answer of this trial
                self._fail(trial, exc)
                if not isinstance(exc, Exception):
                    for waiting in tuple(self._trials.values()):
                        self._fail(waiting, exc)
                    raise
            else:
                self._note(trial, result)
            finally:
                self._running = None

    def _fail(self, trial: _Trial, exc: BaseException) -> None:
        """End a trial that found out nothing."""
        with suppress(ValueError):
            self._queue.remove(trial)
        if not trial.done.done():
            known = exc if isinstance(exc, Refusal) else Refusal("busy:grammar", retry_after=_RETRY)
            trial.done.set_exception(known)
            trial.done.exception()  # perhaps nobody waits for it any more
        self._forget(trial)

    def _note(self, trial: _Trial, result: dict[str, Any]) -> None:
        """Remember what a trial has found, or let it wait for a longer trial."""
        too_short = result.get("over") == "time" and trial.seconds < SECONDS
        if too_short:
            trial.seconds = SECONDS
        if too_short or "stopped" in result:
            trial.stopped = False
            if trial.wanted:  # perhaps again, since it was told to stop
                self._queue.append(trial)
            else:
                self._forget(trial)
            return
        found = trial.grammar
        if self._unable is None:
            found = _found(trial, result, self._known.get(found.name))
            self._known[found.name] = found
            if len(self._known) > _REMEMBERED:
                del self._known[next(iter(self._known))]
        self._trials.pop(found.name, None)
        if not trial.done.done():
            trial.done.set_result(found)

    async def _try(self, trial: _Trial) -> dict[str, Any]:
        """Return the answer of the process; start the process anew once if it or its fork is ended.

        Raises:
            Refusal: the host is too busy, or somebody ends the process again and again (503).
        """
        said = {"chat": trial.grammar.chat, "seconds": trial.seconds, "said": trial.said}
        line = msgspec.json.encode(said) + b"\n"
        for _ in range(2):
            with suppress(OSError, EOFError):
                process = await self._ready()
                if self._unable is not None:
                    return {}
                assert process.stdin is not None
                process.stdin.write(line)
                result = await _answer(process)
                if "ended" not in result:
                    return result
            await self._kill()
        raise Refusal("busy:grammar", retry_after=_RETRY)

    async def _ready(self) -> asyncio.subprocess.Process:
        """Return the process that tries grammars; start it if none runs."""
        async with self._start:
            if self._process is None or self._process.returncode is not None:
                self._process = await self._started()
            return self._process

    async def _started(self) -> asyncio.subprocess.Process:
        """Start the process, and wait until it is ready."""
        pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe, stderr=nothing,
            env={**os.environ, **_ENVIRONMENT},
        )  # fmt: skip
        try:
            ready = await _answer(process)
        except BaseException:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        if "unable" in ready:
            self._unable = ready
            self._say(
                "warning: grammars of response_format and tools cannot be tried before engines"
                f" compile them, and an engine may compile for minutes: {ready['unable']}"
            )
        return process


def _found(trial: _Trial, result: dict[str, Any], known: Grammar | None) -> Grammar:
    """Return a grammar with what its trial has found."""
    given, over = trial.grammar, result.get("over")
    why, until = _WHY.get(over) if over else None, float("inf")
    if "wrong" in result:
        why = f"cannot be compiled: {result['wrong']}"
    if trial.said:  # a second look
        if over != "token":
            return known or given
        why, until = f"held up an engine: it {why}", time.monotonic() + _HOUR
    price = result.get("price", 0.0)
    return replace(given, price=price if price > _FREE else 0.0, why=why, until=until)


async def _answer(process: asyncio.subprocess.Process) -> dict[str, Any]:
    """Return the next answer of the process.

    Raises:
        EOFError: the process has ended.
        Refusal: the process gives no answer in time.
    """
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), _ANSWER_SECONDS)
    except asyncio.TimeoutError:
        raise Refusal("busy:grammar", retry_after=_RETRY) from None
    if not line.endswith(b"\n"):
        raise EOFError
    return msgspec.json.decode(line, type=dict[str, Any])


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
        sys.executable, str(Path(__file__).with_name("grammar_process.py")), str(GRAMMAR_TRIAL),
        str(TOKEN_SECONDS), folder, trust, *words,
    )  # fmt: skip
    return GrammarTrials(command, say, ours=ours)
