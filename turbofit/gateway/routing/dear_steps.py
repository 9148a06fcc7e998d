"""Finds grammars that hold up an engine although their trial found no dear token.

A trial follows a few paths of a grammar, and an answer may take another one. An engine computes the
masks of all its grammars between two tokens, so a dear mask is seen as a silence of the engine; but
a long prefill, a busy host or another grammar are silences, too. So a silence accuses nobody: each
grammar at the engine is tried again alone, along the text that its answer has so far. A grammar
whose own tokens are dear there is refused for an hour, and its requests end. Of answers in one
piece, the text is not known, and the trial is a second search.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Final

import msgspec

from turbofit.core.process.log import LazyLogger
from turbofit.core.struct import Struct
from turbofit.gateway.grammar_trials import GrammarTrials
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.routing.engines import Present, RoutedEngine

_LOG: Final = LazyLogger(__name__)

_TICK: Final = 0.5
#: After so many seconds without a byte of an engine, its grammars are looked at: `_STEP` if an
#: answer has begun, `_PREFILL` if the engine only reads prompts, which takes longer.
_STEP: Final = 2.0
_PREFILL: Final = 10.0
#: The least seconds between two looks at a grammar.
_PAUSE: Final = 60.0
#: The most bytes that are kept of an answer.
_MOST_SAID: Final = 1 << 18


class _Delta(Struct):
    content: str | None = None


class _Choice(Struct):
    delta: _Delta = _Delta()
    text: str | None = None


class _Event(Struct):
    choices: tuple[_Choice, ...] = ()


class DearSteps:
    """Watches the engines of a gateway for silences, and looks at the grammars there."""

    def __init__(self, engines: Iterable[RoutedEngine], trials: GrammarTrials) -> None:
        self._engines, self._trials = tuple(engines), trials
        #: When each grammar was last looked at, by its name and `time.monotonic`.
        self._looked: dict[bytes, float] = {}

    async def watch(self) -> None:
        """Look at all engines until the task is cancelled."""
        await asyncio.gather(*map(self._watch, self._engines))

    async def _watch(self, engine: RoutedEngine) -> None:
        """Look at an engine twice a second while a request there has a grammar."""
        while True:
            await engine.got_grammar.wait()
            engine.got_grammar.clear()
            while any(present.grammar is not None for present in engine.in_flight):
                await asyncio.sleep(_TICK)
                begun = any(present.begun for present in engine.in_flight)
                silent = time.monotonic() - engine.silent_since
                if engine.outstanding > 0 and silent > (_STEP if begun else _PREFILL):
                    await self._look(engine)

    async def _look(self, engine: RoutedEngine) -> None:
        """Try the grammars at an engine again, and end the requests of those that are dear."""
        now = time.monotonic()
        self._looked = {name: at for name, at in self._looked.items() if now - at < _PAUSE}
        for present in tuple(engine.in_flight):
            grammar = present.grammar
            if grammar is None or grammar.name in self._looked:
                continue
            self._looked[grammar.name] = now
            found = await self._trials.look_again(grammar, text_of(bytes(present.said)))
            refusal = None if found is None else found.refusal
            if refusal is not None:
                _LOG.info("a grammar held up engine %s: it is refused for an hour", engine.index)
                self._end(grammar.name, refusal)

    def _end(self, name: bytes, refusal: Refusal) -> None:
        """End the requests of the grammar of this name at all engines."""
        for engine in self._engines:
            for present, stop in tuple(engine.in_flight.items()):
                if present.grammar is not None and present.grammar.name == name:
                    stop(refusal)


def note_said(present: Present, events: bytes) -> None:
    """Keep the events of an answer that follows a grammar."""
    if present.grammar is not None and len(present.said) < _MOST_SAID:
        present.said += events


def text_of(events: bytes) -> str:
    """Return the text of the first copy in a stream's events, of the OpenAI API alone."""
    texts = []
    for line in events.split(b"\n"):
        try:
            event = msgspec.json.decode(line.removeprefix(b"data: "), type=_Event)
        except msgspec.MsgspecError:  # the stream's last event, or one of another API
            continue
        texts += [choice.text or choice.delta.content or "" for choice in event.choices[:1]]
    return "".join(texts)
