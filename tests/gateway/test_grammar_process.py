"""What XGrammar itself compiles in time, over a vocabulary as large as a model's.

The stand-ins' vocabulary of 267 tokens hides what a grammar costs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.serving import needs
from tests.support.waiting import HANG, until
from turbofit.core.plan import GRAMMAR_TRIAL
from turbofit.gateway import grammar_trials
from turbofit.gateway.grammar_trials import SECONDS, TOKEN_SECONDS
from turbofit.rehearsal.checkpoint import tokenizer

needs("lmdeploy", "xgrammar", "transformers")
pytestmark = [pytest.mark.lmdeploy]

TOKENS = 90_000
THINK = ("<think>", "</think>")
PROGRAM = Path(grammar_trials.__file__).with_name("grammar_process.py")
DATE, UUID = r"^\d{4}-\d{2}-\d{2}$", "^" + "-".join(f"[0-9a-f]{{{n}}}" for n in (8, 4, 4, 4, 12))
TEXT = {"type": "string"}


def fields(*values: Any) -> dict[str, Any]:
    """An object that must have these fields."""
    names = {f"f{number}": value for number, value in enumerate(values)}
    return {"type": "object", "properties": names, "required": [*names]}


def form(schema: Any) -> dict[str, Any]:
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return {"response_format": given}


def pattern(text: str) -> dict[str, Any]:
    return {"response_format": {"type": "regex_schema", "regex_schema": text}}


def forced(schema: Any) -> dict[str, Any]:
    function = {"name": "f", "parameters": schema}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


def longest(*lengths: int) -> Any:
    return fields(*({**TEXT, "maxLength": length} for length in lengths))


INVOICE = fields({**TEXT, "pattern": DATE}, {"type": "array", "items": longest(60), "maxItems": 10})
BOX = {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4}
#: What people write.
ORDINARY = {
    "nine dates": form(fields(*[{**TEXT, "pattern": DATE}] * 9)),
    "UUIDs": form(fields({**TEXT, "pattern": UUID}, {**TEXT, "format": "uuid"})),
    "50 boxes": form({"type": "array", "items": fields(TEXT, BOX), "maxItems": 50}),
    "20 optional fields": form({**fields(*[TEXT] * 20), "required": []}),
    "an enum of 500": form(fields({"enum": [f"label {number}" for number in range(500)]})),
    "an e-mail, a link, a time": form(
        fields(*({**TEXT, "format": name} for name in ("email", "uri", "date-time")))
    ),
    "any JSON": {"response_format": {"type": "json_object"}},
    "tools": forced(fields(TEXT)), "yes or no": pattern("(yes|no)"),
    "names": pattern("[A-Z][a-z]+( [A-Z][a-z]+){0,5}"),
}  # fmt: skip
#: These take more than a second, most of it to compile, and have a price.
SLOWER = {
    **{f"maxLength {n}": form(longest(n)) for n in (128, 250, 1000)},
    "three lengths": form(longest(255, 255, 100)), ".{1,64}": pattern(".{1,64}"),
    "an invoice, maxLength 60": form(INVOICE),
    "ten texts of 60": form({"type": "array", "items": {**TEXT, "maxLength": 60}, "maxItems": 10}),
}  # fmt: skip
NO_GRAMMAR = {
    "a text": {"response_format": {"type": "text"}},
    "not of LMDeploy's forms": {"response_format": {"type": "structural_tag"}},
}
MANY = "(.{1,32}){1,31}"
HOSTILE = {
    "a pattern of 9,000 bytes": pattern("." * 9000),
    "a tool's pattern": forced(fields({**TEXT, "pattern": "[a-z]" * 3000})),
    "twice optional": pattern("(.|)" * 200),
    # Its search takes longest: some 70 masks, none of which is dear but the last.
    "a tree of six levels": pattern(f"([a-z]{{1,8}}!){{6}}#{MANY}"),
}
#: Cheap to compile; tokens on a branch, after a literal or deep inside take seconds.
DEAR = {
    "at once": pattern("((.{1,2}){1,2})*"), "soon": pattern(MANY),
    "a branch": pattern(rf"(a[a-z]*)|(\x00{MANY})"), "a literal": pattern(rf"\x00{{40}}{MANY}"),
    "all but one": pattern(f"([^#]*)|(#{MANY})"), "deep": pattern(f"[a-z]{{2000}}{MANY}"),
    "a word": pattern(f"[a-z ]*|(password{MANY})"),
    "a tree": pattern(f"([a-z]{{1,8}}!){{4}}#{MANY}"),
    "a field": form({**fields(TEXT, {**TEXT, "pattern": f"^{MANY}$"}), "required": []}),
    "a tool": forced(fields({**TEXT, "pattern": f"^{MANY}$"})),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint without weights, whose tokenizer has `TOKENS` tokens."""
    made = tmp_path_factory.mktemp("model")
    special = tokenizer.special_tokens(TOKENS)
    tokenizer.write_tokenizer(made, special, 4096)
    (made / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"]}))
    file, chance = made / "tokenizer.json", random.Random(1)
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    usual = content["added_tokens"][0]
    for number, text in enumerate(THINK):
        added = {**usual, "id": TOKENS + number, "content": text, "special": False}
        content["added_tokens"].append(added)
    free = iter(sorted({*range(TOKENS)} - {*words.values(), *special.values()}))
    while len(words) < TOKENS - len(special):
        word = "".join(chance.choices("etaoinshrdlucmfwypvbgkqjxz", k=chance.randint(2, 9)))
        if word not in words:
            words[word] = next(free)
    file.write_text(json.dumps(content))
    return made


class Process:
    """The program as it runs; ``first`` is its first answer."""

    def __init__(
        self, folder: Path, *options: str, most: int = GRAMMAR_TRIAL, token: float = TOKEN_SECONDS
    ) -> None:
        words = (str(most), str(token), str(folder), "no", *options)
        self.popen = subprocess.Popen(
            [sys.executable, str(PROGRAM), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **grammar_trials._ENVIRONMENT},
        )  # fmt: skip
        self.first = self.answer()

    def send(self, chat: Any = None, seconds: int = SECONDS, said: str = "") -> None:
        """Send a trial, or, without a chat, the empty line that stops one."""
        trial = json.dumps({"chat": chat, "seconds": seconds, "said": said})
        self.popen.stdin.write(b"\n" if chat is None else trial.encode() + b"\n")
        self.popen.stdin.flush()

    def answer(self) -> Any:
        return json.loads(self.popen.stdout.readline())

    def ask(self, *trial: Any) -> Any:
        self.send(*trial)
        return self.answer()

    def end(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self.popen.stdin.close()
        self.popen.stdout.close()


def fork_of(process: subprocess.Popen[bytes]) -> int:
    """Wait until a trial runs; return its process."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return int(until(lambda: children.read_text().split(), "a trial")[0])


@pytest.fixture(scope="module")
def shared(folder):
    parsers = ("--tool-call-parser", "qwen3", "--reasoning-parser", "default")
    made = Process(folder, *parsers, "--other")
    yield made
    made.end()


def verdicts(process: Process, chats: dict[str, Any], seconds: int) -> dict[str, Any]:
    """What the program says of each chat, by its name."""
    return {name: process.ask(chat, seconds) for name, chat in chats.items()}


def prices(verdicts: dict[str, Any]) -> dict[str, float]:
    """The price of each grammar that passes; no key for another one."""
    return {name: said["price"] for name, said in verdicts.items() if "price" in said}


def test_ordinary_grammars_pass_a_short_trial_and_cost_nothing(shared):
    # Each takes a second or less, the first trial's, on a core that nothing else uses.
    said = verdicts(shared, ORDINARY, 3 * grammar_trials._SHORT)
    assert prices(said).keys() == ORDINARY.keys(), said


def test_what_is_no_grammar_or_none_of_xgrammar_s_is_said(shared):
    assert shared.first == {}
    assert shared.ask(pattern("("))["wrong"].startswith("Regex parsing error")
    assert [*verdicts(shared, NO_GRAMMAR, 4).values()] == [{}] * len(NO_GRAMMAR)


def test_a_hostile_grammar_is_ended_and_the_next_one_tried(shared):
    ended = shared.ask(HOSTILE["a pattern of 9,000 bytes"], 1)
    assert ended in ({"over": "time"}, {"over": "memory"})
    assert shared.ask(form(TEXT))["price"] < TOKEN_SECONDS


@pytest.mark.exhaustive
def test_what_takes_more_memory_than_a_trial_may_is_no_grammar(folder):
    process = Process(folder, most=1 << 20)
    said = process.ask(form(longest(60)), 60)
    process.end()
    assert said == {"over": "memory"}


@pytest.mark.exhaustive
def test_lengths_that_people_write_pass_and_have_a_price(shared):
    said = verdicts(shared, SLOWER, SECONDS)
    found = prices(said)
    assert found.keys() == SLOWER.keys(), said
    assert min(found.values()) > grammar_trials._FREE


@pytest.mark.exhaustive
def test_hostile_grammars_are_ended_in_that_time(shared):
    said = verdicts(shared, HOSTILE, SECONDS)
    assert {name: [*verdict] for name, verdict in said.items()} == {
        name: ["over"] for name in HOSTILE
    }


def test_what_compiles_at_once_is_refused_for_one_dear_token_wherever_it_is(shared):
    places = ("at once", "a branch")  # all of them in the exhaustive test below
    said = verdicts(shared, {name: DEAR[name] for name in places}, SECONDS)
    assert [*said.values()] == [{"over": "token"}] * len(places)


@pytest.mark.exhaustive
def test_a_dear_token_is_found_in_every_form(shared):
    said = verdicts(shared, DEAR, SECONDS)
    # In a JSON string, some compile for too long before that.
    assert {name: [*verdict] for name, verdict in said.items()} == {name: ["over"] for name in DEAR}


def test_the_schema_of_a_forced_tool_is_found_behind_a_model_s_thoughts(shared):
    plain = shared.ask(forced(fields(TEXT)))
    limited = shared.ask(forced(longest(8)), 6)
    # What a token takes near the end of 8 characters is seen only there.
    assert limited["price"] > grammar_trials._FREE
    assert plain["price"] < limited["price"] / 2


def test_a_text_that_was_answered_leads_to_its_dear_token(shared):
    text = "a" * 30 + "b" * 10
    assert shared.ask(pattern("[a-z]{40}"), 6, text)["price"] < TOKEN_SECONDS
    assert shared.ask(pattern(f"[a-z]{{30}}{MANY}"), SECONDS, text) == {"over": "token"}


def test_a_trial_is_stopped_and_its_fork_ended_from_outside_is_not_the_grammar_s_fault(shared):
    slow = HOSTILE["a pattern of 9,000 bytes"]
    shared.send(slow, 600)
    fork_of(shared.popen)
    shared.send()
    assert shared.answer() == {"stopped": 0}
    shared.send()  # came too late
    shared.send(slow, 600)
    os.kill(fork_of(shared.popen), signal.SIGKILL)
    assert shared.answer() == {"ended": signal.SIGKILL}
    assert shared.ask(form(TEXT))["price"] < TOKEN_SECONDS


@pytest.mark.parametrize("end", [subprocess.Popen.kill, lambda process: process.stdin.close()])
def test_a_fork_ends_with_its_process(end):
    """Whatever it tries: a wait, here."""
    tries = "g._ANSWERS = 1; g.attempt({'seconds': 600}, signal.pause, 1 << 30, g.Input())"
    words = ("-c", f"import signal; from turbofit.gateway import grammar_process as g; {tries}")
    with subprocess.Popen([sys.executable, *words], stdin=subprocess.PIPE) as process:
        fork = fork_of(process)
        end(process)
        process.wait()
        until(lambda: not Path(f"/proc/{fork}").exists(), "the end of the fork")


def test_it_ends_with_its_parent_while_it_imports(tmp_path):
    stand_in = "import os, signal\nos.write(2, b'here\\n')\nsignal.pause()\n"
    (tmp_path / "xgrammar.py").write_text(stand_in)
    starts = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
    with subprocess.Popen(
        [sys.executable, "-c", starts, str(PROGRAM), "1", "1", "no folder", ""],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as parent:  # fmt: skip
        assert parent.stderr is not None
        assert parent.stderr.readline() == b"here\n"
        parent.kill()
        assert parent.communicate(timeout=HANG)[1] == b""


@pytest.mark.exhaustive
def test_a_folder_without_a_tokenizer_is_said(tmp_path):
    process = Process(tmp_path)
    assert process.first["unable"]
    assert process.first["lacks"] is None
    process.end()


@pytest.mark.parametrize(
    ("package", "lacks"),
    [("raise OSError('none')", None), ("import no_such_package", "no_such_package")],
)
def test_why_nothing_can_be_tried_is_said(tmp_path, monkeypatch, package, lacks):
    (tmp_path / "xgrammar.py").write_text(package)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = Process(tmp_path)
    assert process.first["unable"]
    assert process.first["lacks"] == lacks
    process.end()
