"""Which grammars are tried again while an engine is silent, and whose requests end."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests import virtual_time
from tests.support.gateway import CHAT, DONE, EVENT, Recorder, call, chat, gateway, stream
from tests.virtual_time import settled
from turbofit.gateway.grammar_trials import Grammar, GrammarTrials
from turbofit.gateway.routing.dear_steps import DearSteps, text_of
from turbofit.gateway.routing.engines import RoutedEngine


class Trials(GrammarTrials):
    """Names a grammar by its pattern; in a second look "dear" is dear, and "priced" has a price."""

    def __init__(self) -> None:
        super().__init__((), print)
        self.looks: list[tuple[str, str]] = []

    async def check(self, body, who):
        word = body.get("response_format", {}).get("regex_schema")
        price = 0.3 if word == "priced" else 0.0
        return word and Grammar(word.encode(), {}, "response_format", price)

    async def look_again(self, grammar, said):
        self.looks.append((grammar.name.decode(), said))
        return replace(grammar, why="held up an engine" if grammar.name == b"dear" else None)


def answers(app, *words: str, **given) -> list[asyncio.Task]:
    """Requests of clients of their own with these grammars; none for an empty word."""
    return [
        asyncio.ensure_future(
            call(app, CHAT, chat(stream=True, **given, **(pattern(word) if word else {})))
        )
        for word in words
    ]


def pattern(word: str):
    return {"response_format": {"type": "regex_schema", "regex_schema": word}}


async def test_of_the_grammars_at_a_silent_engine_only_a_dear_one_ends() -> None:
    go_on = asyncio.Event()
    trials = Trials()
    app, _ = gateway(
        recorder=Recorder(lambda *_: stream(EVENT, EVENT, go_on, EVENT, DONE)), grammars=trials
    )
    await app.startup()
    dear, innocent, plain, *more = answers(app, "dear", "innocent", "", "dear")
    await asyncio.sleep(1.0)
    assert trials.looks == []
    await asyncio.sleep(3.0)
    assert trials.looks == [("dear", "xx"), ("innocent", "xx")]
    assert [task.done() for task in (dear, innocent, plain, *more)] == [True, False, False, True]
    for refused in (await dear, await more[0]):
        assert "held up an engine" in refused.body.decode()
    await asyncio.sleep(30.0)
    assert len(trials.looks) == 2  # not again and again
    go_on.set()
    for other in (await innocent, await plain):
        assert other.body.endswith(DONE)
    assert app.deny_list.numbers == (0, 0)
    assert app.engines[0].up
    await app.shutdown()


async def test_each_engine_is_looked_at() -> None:
    """The first engine has a request without a grammar, and the second one the dear grammar."""
    go_on = asyncio.Event()
    trials = Trials()
    recorder = Recorder(lambda *_: stream(EVENT, EVENT, go_on, EVENT, DONE))
    app, _ = gateway(engines=2, recorder=recorder, grammars=trials)
    await app.startup()
    (plain,) = answers(app, "")
    await settled()
    (dear,) = answers(app, "dear")
    await asyncio.sleep(4.0)
    assert [engine.outstanding for engine in app.engines] == [1, 0]
    assert "held up an engine" in (await dear).body.decode()
    go_on.set()
    assert (await plain).body.endswith(DONE)
    await app.shutdown()


async def test_a_prefill_is_given_more_time_than_a_token() -> None:
    begin = asyncio.Event()
    trials = Trials()
    app, _ = gateway(recorder=Recorder(lambda *_: stream(begin, EVENT, DONE)), grammars=trials)
    await app.startup()
    (task,) = answers(app, "innocent")
    await asyncio.sleep(8.0)
    assert trials.looks == []
    await asyncio.sleep(5.0)
    assert trials.looks == [("innocent", "")]
    begin.set()
    assert (await task).status == 200
    await app.shutdown()


async def test_grammars_wait_where_their_prices_would_add_up_and_texts_pass() -> None:
    go_on = asyncio.Event()
    app, recorder = gateway(
        recorder=Recorder(lambda *_: stream(EVENT, go_on, DONE)), grammars=Trials()
    )
    first, second, cheap, plain = answers(app, "priced", "priced", "cheap", "")
    await settled()
    assert app.admission.waiting == 1
    assert len(recorder.seen) == 3
    (refused,) = answers(app, "priced", n=2)
    assert "n is 2; with this grammar the limit is 1" in (await refused).body.decode()
    go_on.set()
    for task in (first, second, cheap, plain):
        assert (await task).status == 200
    assert app.engines[0].token_seconds == []


def test_nothing_wakes_for_an_engine_without_a_grammar() -> None:
    watching = DearSteps([RoutedEngine(0, "http://engine")], Trials()).watch()
    with pytest.raises(AssertionError, match="for no timer"):
        virtual_time.run(watching)


def test_the_text_of_events_is_that_of_the_first_copy():
    events = EVENT + b'data: {"choices":[{"text":"y"},{"text":"z"}]}\n\n: ping\n\n' + DONE
    assert text_of(events) == "xy"
    assert text_of(b'event: x\ndata: {"delta":{}}\n\n') == ""
