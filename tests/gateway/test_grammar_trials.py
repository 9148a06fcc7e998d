"""Each new grammar goes through one process before an engine has it; a stand-in plays it here."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.gateway import CHAT, call, chat, gateway
from tests.support.plans import plausible_plan
from tests.support.waiting import auntil
from turbofit.gateway import grammar_trials
from turbofit.gateway.grammar_trials import SECONDS, TOKEN_SECONDS, GrammarTrials, trials_of
from turbofit.gateway.http.refusals import Refusal

#: Answers each pattern by its first word, and writes down what it was asked. "hold" waits until a
#: file is there, or until it is told to stop.
STAND_IN = """
import json, os, select, sys, time
folder, ready = sys.argv[1:]
print(ready, flush=True)
for line in sys.stdin:
    if not line.strip():
        continue
    trial = json.loads(line)
    word = trial["chat"]["response_format"]["regex_schema"]
    with open(folder + "/asked", "a") as file:
        file.write(f"{os.getpid()} {word}{trial['said']}{':long' * (trial['seconds'] > 1)}\\n")
    kind = word.partition(" ")[0]
    times = open(folder + "/asked").read().count(word)
    if kind == "die" or (kind == "once" and times == 1):
        os.kill(os.getpid(), 9)
    while kind == "hold" and not os.path.exists(folder + "/go"):
        if select.select([0], [], [], 0.01)[0]:
            kind = "stopped"
            sys.stdin.readline()
    if kind == "silent":
        time.sleep(600)
    short = trial["seconds"] == 1
    said = {
        "wrong": {"wrong": "at position 2"}, "slow": {"over": "time"}, "dear": {"over": "token"},
        "killed": {"ended": 9}, "long": {"over": "time"} if short else {"price": 0.25},
        "stopped": {"stopped": 0},
    }.get(kind, {"price": 0.001 if kind == "fine" else 0.25})
    if trial["said"] == "dear":
        said = {"over": "token"}
    print(json.dumps(said), flush=True)
"""


class Stand:
    """A stand-in's trials, what they say, and what they were asked."""

    def __init__(self, folder: Path, ready: Any = None, **given: Any) -> None:
        program = folder / "stand_in.py"
        program.write_text(STAND_IN)
        self.folder, self.said = folder, list[str]()
        words = (sys.executable, str(program), str(folder), json.dumps(ready or {}))
        self.trials = GrammarTrials(words, self.said.append, **given)

    @property
    def asked(self) -> list[str]:
        return [line.partition(" ")[2] for line in self._lines()]

    @property
    def processes(self) -> set[str]:
        return {line.partition(" ")[0] for line in self._lines()}

    def _lines(self) -> list[str]:
        file = self.folder / "asked"
        return file.read_text().splitlines() if file.exists() else []

    async def check(self, word: str, who: Any = "a") -> Refusal | None:
        try:
            await self.trials.check(pattern(word), who)
        except Refusal as refusal:
            return refusal
        return None

    async def asks(self, word: str) -> None:
        """Wait until the process was asked for this one."""
        while word not in self.asked:
            await asyncio.sleep(0.01)

    def run(self, story) -> None:
        async def whole() -> None:
            try:
                await asyncio.wait_for(story, 60)
            finally:
                await self.trials.end()

        asyncio.run(whole())


def pattern(word: str) -> dict[str, Any]:
    return {"response_format": {"type": "regex_schema", "regex_schema": word}}


@pytest.fixture
def stand(tmp_path):
    return Stand(tmp_path)


def test_each_grammar_is_tried_once_and_no_process_starts_before_the_first(stand):
    async def story():
        assert await stand.check("") is None  # no pattern is a grammar, too
        assert await stand.trials.check({"response_format": {"type": "text"}}, "a") is None
        for word in ("fine", "slow", "wrong", "dear", "fine", "slow", "wrong", "dear"):
            refusal = await stand.check(word)
            assert (refusal is None) == (word == "fine")

    stand.run(story())
    assert stand.asked == ["", "fine", "slow", "slow:long", "wrong", "dear"]
    assert len(stand.processes) == 1


def test_the_price_of_a_grammar_is_remembered_and_a_small_one_is_none(stand):
    async def story():
        for _ in range(2):
            checks = [await stand.trials.check(pattern(word), "a") for word in ("long", "fine")]
            assert [grammar.price for grammar in checks] == [0.25, 0.0]

    stand.run(story())
    assert stand.asked == ["long", "long:long", "fine"]


def test_the_process_is_started_before_it_is_needed(stand):
    async def story():
        await asyncio.gather(stand.trials.start(), stand.check("fine"))
        assert await stand.check("more") is None

    stand.run(story())
    assert len(stand.processes) == 1


def test_a_text_needs_no_process(stand):
    stand.run(stand.trials.check({"response_format": {"type": "text"}}, "a"))
    assert stand.trials._process is None


def test_a_refusal_says_what_was_too_long_or_what_is_wrong(stand):
    async def story():
        slow, wrong, dear = [await stand.check(word) for word in ("slow", "wrong", "dear")]
        assert (slow.status, slow.param, wrong.status) == (400, "response_format", 400)
        assert f"{SECONDS} s" in slow.message
        assert wrong.message.endswith("at position 2")
        assert (dear.status, dear.param) == (400, "response_format")
        assert f"{TOKEN_SECONDS} s" in dear.message

    stand.run(story())


@pytest.mark.parametrize(("word", "tried"), [("die", 2), ("silent", 1), ("killed", 2)])
def test_a_trial_without_an_answer_is_not_the_grammar_s_fault(stand, monkeypatch, word, tried):
    async def story():
        monkeypatch.setattr(grammar_trials, "_ANSWER_SECONDS", 1.0 if word == "silent" else 60.0)
        refusal = await stand.check(word)
        assert (refusal.status, refusal.reason, refusal.retry_after) == (503, "busy", 5)
        monkeypatch.setattr(grammar_trials, "_ANSWER_SECONDS", 60.0)
        assert stand.asked == [word] * tried
        assert await stand.check("fine") is None
        await stand.check(word) if word != "silent" else None  # it is tried again

    stand.run(story())
    assert stand.asked.count(word) == (2 * tried if word != "silent" else 1)


def test_a_process_that_was_killed_is_started_anew(stand):
    async def story():
        assert await stand.check("once") is None  # killed during the trial
        stand.trials._process.kill()  # and while it is idle
        await stand.trials._process.wait()
        assert await stand.check("fine") is None

    stand.run(story())
    assert len(stand.processes) == 3


def test_a_wait_for_a_trial_has_an_end_and_the_trial_goes_on(stand, monkeypatch):
    async def story():
        monkeypatch.setattr(grammar_trials, "_WAIT_SECONDS", 1.0)
        running = asyncio.ensure_future(stand.check("hold"))
        await stand.asks("hold")
        refusals = await asyncio.gather(running, stand.check("fine", "b"))
        assert [(each.status, each.reason, each.retry_after) for each in refusals] == [
            (503, "busy", 5)
        ] * 2
        monkeypatch.setattr(grammar_trials, "_WAIT_SECONDS", 60.0)
        (stand.folder / "go").touch()
        assert await stand.check("hold") is None

    stand.run(story())
    assert stand.asked == ["hold"]  # that of the other client did not wait any more


def test_no_trial_goes_on_for_clients_that_left_while_another_waits(stand):
    async def story():
        left = [asyncio.ensure_future(stand.check("hold", "a"))]
        await stand.asks("hold")
        left += [asyncio.ensure_future(stand.check(f"left {n}", f"c{n}")) for n in range(30)]
        await auntil(lambda: len(stand.trials._trials) == 31, "all to wait")
        for check in left:
            check.cancel()
        await asyncio.wait(left)
        assert await stand.check("fine", "b") is None
        assert await stand.check("left 0", "b") is None

    stand.run(story())
    assert stand.asked == ["hold", "fine", "left 0"]
    assert len(stand.processes) == 1


def test_a_trial_for_a_client_that_left_ends_if_nobody_else_waits(stand):
    async def story():
        left = asyncio.ensure_future(stand.check("hold"))
        await stand.asks("hold")
        left.cancel()
        await asyncio.wait({left})
        (stand.folder / "go").touch()
        assert await stand.check("hold") is None  # what it found is known

    stand.run(story())
    assert stand.asked == ["hold"]


def test_long_trials_come_after_short_ones(stand):
    async def story():
        checks = [asyncio.ensure_future(stand.check("hold"))]
        await stand.asks("hold")
        words = ("long 1", "long 2", "fine 1", "fine 2")
        checks += [asyncio.ensure_future(stand.check(word, word)) for word in words]
        await asyncio.sleep(0)
        (stand.folder / "go").touch()
        assert await asyncio.gather(*checks) == [None] * 5

    stand.run(story())
    short = ["long 1", "long 2", "fine 1", "fine 2"]
    assert stand.asked == ["hold", *short, "long 1:long", "long 2:long"]


def test_one_client_has_one_grammar_on_trial(stand):
    async def story():
        mine = [asyncio.ensure_future(stand.check("hold 0"))]
        await stand.asks("hold 0")
        mine += [asyncio.ensure_future(stand.check(f"fine {n}")) for n in range(4)]
        await asyncio.sleep(0)
        theirs = asyncio.ensure_future(stand.check("theirs", "b"))
        await asyncio.sleep(0)
        (stand.folder / "go").touch()
        assert await asyncio.gather(theirs, *mine) == [None] * 6

    stand.run(story())
    assert stand.asked[:2] == ["hold 0", "theirs"]


def test_a_second_look_refuses_only_a_grammar_that_is_dear_itself(stand, monkeypatch):
    async def story():
        dear, innocent = [await stand.trials.check(pattern(word), "a") for word in ("x", "y")]
        assert (await stand.trials.look_again(innocent, "cheap")).refusal is None
        found = await stand.trials.look_again(dear, "dear")
        assert "held up an engine" in found.refusal.message
        assert await stand.check("y") is None
        assert (await stand.check("x")).status == 400
        assert time.monotonic() + 3500 < found.until < time.monotonic() + 3600
        monkeypatch.setattr(grammar_trials, "_HOUR", -1.0)  # as if it was an hour ago
        await stand.trials.look_again(dear, "dear")
        assert await stand.check("x") is None

    stand.run(story())
    assert stand.asked == ["x", "y", "ycheap:long", "xdear:long", "xdear:long", "x"]


def test_a_second_look_goes_on_when_a_client_of_the_grammar_waits_no_longer(stand, monkeypatch):
    async def story():
        grammar = await stand.trials.check(pattern("x"), "a")
        stand.trials._known.clear()  # as if others had come since
        running = asyncio.ensure_future(stand.check("hold"))
        await stand.asks("hold")
        look = asyncio.ensure_future(stand.trials.look_again(grammar, "dear"))
        await auntil(lambda: grammar.name in stand.trials._trials, "the second look to wait")
        monkeypatch.setattr(grammar_trials, "_WAIT_SECONDS", 0.1)
        assert (await stand.check("x", "b")).status == 503
        (stand.folder / "go").touch()
        assert (await look).refusal is not None
        await running

    stand.run(story())


def test_the_same_grammar_of_two_clients_is_tried_once(stand):
    async def story():
        assert await asyncio.gather(*(stand.check("fine", who) for who in "abc")) == [None] * 3

    stand.run(story())
    assert stand.asked == ["fine"]


def test_only_so_many_are_remembered(stand, monkeypatch):
    async def story():
        monkeypatch.setattr(grammar_trials, "_REMEMBERED", 2)
        for word in ("x", "y", "z", "z", "y", "x"):
            await stand.check(word)

    stand.run(story())
    assert stand.asked == ["x", "y", "z", "x"]


def test_where_none_can_be_tried_all_pass_and_it_is_said_once(tmp_path):
    stand = Stand(tmp_path, {"unable": "OSError: no tokenizer", "lacks": None})

    async def story():
        checks = [stand.check(word, who) for who, word in enumerate(("slow", "wrong", "die"))]
        assert await asyncio.gather(*checks) == [None] * 3

    stand.run(story())
    assert stand.asked == []
    assert len(stand.said) == 1
    assert "tried" in stand.said[0]
    assert "OSError: no tokenizer" in stand.said[0]


@pytest.mark.parametrize("ours", [True, False])
def test_xgrammar_is_named_where_the_engines_lack_it(tmp_path, ours):
    lacks = {"unable": "ModuleNotFoundError: No module named 'xgrammar'", "lacks": "xgrammar"}
    stand = Stand(tmp_path, lacks, ours=ours)

    async def story():
        refusals = [await stand.check(word) for word in ("x", "y")]
        if not ours:  # other engines may have it
            assert refusals == [None, None]
            return
        for refusal in refusals:
            assert (refusal.status, refusal.reason) == (400, "option_missing")
            said = "response_format needs xgrammar on the server: pip install xgrammar"
            assert refusal.message == said

    stand.run(story())


def test_a_gateway_passes_a_grammar_unchanged_and_answers_texts_beside_a_trial(stand):
    async def story():
        app, recorder = gateway(grammars=stand.trials)
        held = asyncio.ensure_future(call(app, CHAT, chat(**pattern("hold"))))
        await stand.asks("hold")
        assert (await call(app, CHAT, chat())).status == 200
        assert not held.done()
        (stand.folder / "go").touch()
        assert (await held).status == 200
        assert recorder.bodies[-1]["response_format"] == pattern("hold")["response_format"]
        before = len(recorder.seen)
        refused = await call(app, CHAT, chat(**pattern("slow")))
        assert refused.status == 400
        assert "processor time" in refused.json["error"]["message"]
        assert len(recorder.seen) == before
        await app.shutdown()

    stand.run(story())


def test_trials_are_of_lmdeploy_s_engines_with_their_parsers():
    made = trials_of(plausible_plan(), "/m", ["--tool-call-parser=qwen3"], print, ours=True)
    assert made._command[-4:] == ("/m", "trust", "--tool-call-parser", "qwen3")
    assert made._command[2:4] == (str(512 << 20), str(TOKEN_SECONDS))
