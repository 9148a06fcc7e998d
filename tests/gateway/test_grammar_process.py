"""What XGrammar itself compiles in time, over a vocabulary as large as a model's.

The stand-ins' vocabulary of 267 tokens hides what a grammar costs.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.serving import needs
from turbofit.gateway import grammar_trials
from turbofit.gateway.grammar_trials import SECONDS
from turbofit.rehearsal.checkpoint import tokenizer

needs("lmdeploy", "xgrammar", "transformers")
pytestmark = [pytest.mark.lmdeploy]

TOKENS = 90_000
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
ORDINARY = {
    "nine dates": form(fields(*[{**TEXT, "pattern": DATE}] * 9)),
    "UUIDs": form(fields({**TEXT, "pattern": UUID}, {**TEXT, "format": "uuid"})),
    "an array of 50": form({"type": "array", "items": fields(TEXT, TEXT), "maxItems": 50}),
    "20 optional fields": form({**fields(*[TEXT] * 20), "required": []}),
    "an invoice, maxLength 60": form(INVOICE),
    "any JSON": {"response_format": {"type": "json_object"}},
    "tools": forced(fields(TEXT)), "a text": {"response_format": {"type": "text"}},
    "not of LMDeploy's forms": {"response_format": {"type": "structural_tag"}},
}  # fmt: skip
SLOWER = {
    **{f"maxLength {n}": form(longest(n)) for n in (128, 255, 1000)},
    "three lengths": form(longest(255, 255, 100)), ".{1,64}": pattern(".{1,64}"),
}  # fmt: skip
HOSTILE = {
    "a pattern of 9,000 bytes": pattern("." * 9000),
    "a tool's pattern": forced(fields({**TEXT, "pattern": "[a-z]" * 3000})),
    "twice optional": pattern("(.|)" * 200),
}


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
    free = iter(sorted({*range(TOKENS)} - {*words.values(), *special.values()}))
    while len(words) < TOKENS - len(special):
        word = "".join(chance.choices("etaoinshrdlucmfwypvbgkqjxz", k=chance.randint(2, 9)))
        if word not in words:
            words[word] = next(free)
    file.write_text(json.dumps(content))
    return made


def verdicts(
    folder: Path, chats: Any, seconds: int, most: int = grammar_trials.GRAMMAR_TRIAL
) -> list[Any]:
    """What the program says first, and then of each chat."""
    words = (str(seconds), str(most), str(folder), "no", "--tool-call-parser", "qwen3", "--other")
    given = "".join(json.dumps(chat) + "\n" for chat in chats)
    told = subprocess.run(
        [sys.executable, str(PROGRAM), *words], input=given, capture_output=True, text=True,
        timeout=600, check=True, env={**os.environ, **grammar_trials._ENVIRONMENT},
    )  # fmt: skip
    return [json.loads(line) for line in told.stdout.splitlines()]


def test_ordinary_grammars_compile_and_a_hostile_one_is_ended(folder):
    hostile = HOSTILE["a pattern of 9,000 bytes"]
    ready, wrong, *others, ended, after = verdicts(
        folder, [pattern("("), *ORDINARY.values(), hostile, form(TEXT)], 4
    )
    assert ready == {}
    assert wrong["wrong"].startswith("Regex parsing error")
    assert dict(zip(ORDINARY, others, strict=True)) == {name: {} for name in ORDINARY}
    assert ended in ({"ended": 24}, {"ended": 0})  # by time, or where a thread has no memory
    assert after == {}  # the process itself goes on


@pytest.mark.exhaustive
def test_what_takes_more_memory_than_a_trial_may_is_no_grammar(folder):
    assert verdicts(folder, [form(longest(60))], 60, 1 << 20)[1] != {}


@pytest.mark.exhaustive
def test_lengths_that_people_write_compile_in_the_time_that_a_gateway_gives(folder):
    said = verdicts(folder, SLOWER.values(), SECONDS)[1:]
    assert dict(zip(SLOWER, said, strict=True)) == {name: {} for name in SLOWER}


@pytest.mark.exhaustive
def test_hostile_grammars_are_ended_in_that_time(folder):
    said = verdicts(folder, HOSTILE.values(), SECONDS)[1:]
    ended = {name: [*verdict] for name, verdict in zip(HOSTILE, said, strict=True)}
    assert ended == {name: ["ended"] for name in HOSTILE}


def test_what_compiles_at_once_and_takes_minutes_to_follow_is_ended(folder):
    said = verdicts(folder, [pattern("(.{1,32}){1,31}"), form(TEXT)], 4)[1:]
    assert said == [{"ended": 24}, {}]


def test_a_folder_without_a_tokenizer_is_said(tmp_path):
    (said,) = verdicts(tmp_path, [form(TEXT)], 1)
    assert said["unable"]
    assert said["lacks"] is None
