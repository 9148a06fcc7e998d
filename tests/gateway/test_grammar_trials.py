"""Each new grammar goes through one process before an engine has it; a stand-in plays it here."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.gateway import CHAT, call, chat, gateway
from tests.support.plans import plausible_plan
from turbofit.gateway import grammar_trials
from turbofit.gateway.grammar_trials import GrammarTrials, trials_of
from turbofit.gateway.http.refusals import Refusal

#: Answers each pattern by its first word, and writes down what it was asked. "hold" waits until a
#: file is there.
STAND_IN = """
import json, os, sys, time
folder, ready = sys.argv[1:]
print(ready, flush=True)
for line in sys.stdin:
    word = json.loads(line)["response_format"]["regex_schema"]
    with open(folder + "/asked", "a") as file:
        file.write(f"{os.getpid()} {word}\\n")
    kind = word.partition(" ")[0]
    if kind == "die":
        os.kill(os.getpid(), 9)
    while kind == "hold" and not os.path.exists(folder + "/go"):
        time.sleep(0.01)
    if kind == "silent":
        time.sleep(600)
    said = {"wrong": {"wrong": "at position 2"}, "slow": {"ended": 24}}.get(kind, {})
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
        await stand.trials.check({"response_format": {"type": "text"}}, "a")
        for word in ("fine", "slow", "wrong", "fine", "slow", "wrong"):
            refusal = await stand.check(word)
            assert (refusal is None) == (word == "fine")

    stand.run(story())
    assert stand.asked == ["", "fine", "slow", "wrong"]
    assert len(stand.processes) == 1


def test_a_text_needs_no_process(stand):
    stand.run(stand.trials.check({"response_format": {"type": "text"}}, "a"))
    assert stand.trials._process is None


def test_a_refusal_says_what_was_too_long_or_what_is_wrong(stand):
    async def story():
        slow, wrong = await stand.check("slow"), await stand.check("wrong")
        assert (slow.status, slow.param, wrong.status) == (400, "response_format", 400)
        assert "not compiled within 15 s of processor time and 512 MiB" in slow.message
        assert wrong.message == "response_format cannot be compiled: at position 2"

    stand.run(story())


@pytest.mark.parametrize("word", ["die", "silent"])
def test_a_process_that_gives_no_answer_is_started_anew(stand, monkeypatch, word):
    async def story():
        monkeypatch.setattr(grammar_trials, "_ANSWER_SECONDS", 60.0 if word == "die" else 1.0)
        refusal = await stand.check(word)
        assert (refusal.status, refusal.reason, refusal.retry_after) == (503, "busy", 5)
        monkeypatch.setattr(grammar_trials, "_ANSWER_SECONDS", 60.0)
        assert await stand.check("fine") is None

    stand.run(story())
    assert len(stand.processes) == 2


def test_a_client_that_leaves_costs_no_new_process(stand):
    async def story():
        left = asyncio.ensure_future(stand.check("hold"))
        await stand.asks("hold")
        left.cancel()
        other = asyncio.ensure_future(stand.check("fine", "b"))
        (stand.folder / "go").touch()
        assert await other is None
        await asyncio.wait({left})
        assert left.cancelled()
        assert await stand.check("hold") is None  # what it found is known

    stand.run(story())
    assert stand.asked == ["hold", "fine"]
    assert len(stand.processes) == 1


def test_grammars_of_one_client_wait_behind_each_other_s_one(stand):
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
        app, recorder = gateway()
        app.grammars = stand.trials
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
    assert made._command[2:4] == ("15", str(512 << 20))
