"""Each parameter held to the range that engines survive."""

from __future__ import annotations

import copy
import unicodedata
from contextlib import suppress
from typing import Any

import msgspec
import pytest

from tests.support.gateway import chat
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.gate import UNSTATED
from turbofit.gateway.limits.ranges import (
    RULES,
    hold_parameters,
    lower_answer,
    most_tokens,
    state_answer,
)
from turbofit.gateway.limits.request_body import read_body
from turbofit.gateway.limits.rules import Scope


def of(engine: str) -> Scope:
    return Scope(engine=engine, vocabulary=512, context=4096)


SCOPE = of("turbomind")
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
BASE: dict[str, dict[str, Any]] = {
    "chat": CHAT,
    "completions": {"model": "m", "prompt": "x"},
    "generate": {"prompt": "x"},
    "messages": {**CHAT, "max_tokens": 5},
    "responses": {"model": "m", "input": "x"},
    "count_tokens": CHAT,
}


def in_range(kind: Any, scope: Scope = SCOPE, **fields: Any) -> tuple[dict[str, Any], list[str]]:
    body = read_body(kind, {**copy.deepcopy(BASE[kind]), **fields}).body
    return body, hold_parameters(kind, body, scope)


def refused(kind: Any, scope: Scope = SCOPE, **fields: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        in_range(kind, scope, **fields)
    assert caught.value.status == 400
    return caught.value


EMPTY = {"type": "text", "text": ""}


def test_engines_differ_where_they_do() -> None:
    assert in_range("chat", of("pytorch"), top_k=1000)[0]["top_k"] == 512
    assert in_range("chat", top_k=1000)[0]["top_k"] == 1000
    assert in_range("chat", of("transformers"), stop=[])[0]["stop"] is None


@pytest.mark.parametrize(
    ("engine", "fields", "word"),
    [
        # LMDeploy cannot pickle what it makes of it, and answers 500.
        ("pytorch", {"logit_bias": {"5": 1.0}}, "cannot send this field to its PyTorch engine"),
        # Each costs a walk over its vocabulary.
        ("transformers", {"stop": ["a"] * 3 + ["bcd", "efg"]}, "has 5 strings, the limit is 4"),
        ("transformers", {"stop": ["a" * 30, "b" * 35]}, "has 65 characters together, the limit"),
    ],
)
def test_what_only_other_engines_take_is_refused(engine: str, fields: Any, word: str) -> None:
    assert word in refused("chat", of(engine), **fields).message
    assert fields.items() <= in_range("chat", **fields)[0].items()


@pytest.mark.parametrize(
    ("kind", "fields", "left", "changes"),
    [
        ("chat", {"max_tokens": 9, "max_completion_tokens": 700}, 600,
         ["max_completion_tokens=700->600"]),
        ("messages", {"max_tokens": 4096}, 600, ["max_tokens=4096->600"]),
        ("chat", {"max_tokens": 64000}, 600, ["max_tokens=64000->600"]),  # once, not by its range
        ("responses", {"max_output_tokens": 600}, 600, []),
        ("count_tokens", {}, 1, []),
    ],
)  # fmt: skip
def test_an_answer_is_lowered_to_what_images_leave(kind, fields, left, changes) -> None:
    body, said = in_range(kind, **fields)
    lower_answer(kind, body, left, said)
    assert said == changes


def test_what_is_ordinary_or_of_an_unknown_range_is_passed_as_it_is() -> None:
    fields = {"temperature": 0.7, "top_p": 0.9, "stop": ["\n", "END"], "max_tokens": 64, "seed": 7}
    body = {**chat(**fields), "messages": BASE["chat"]["messages"]}
    assert in_range("chat", **fields) == (body, [])
    fields = {"stop_token_ids": [10**6], "max_tokens": 10**6}
    assert in_range("generate", Scope(), **fields) == ({**BASE["generate"], **fields}, [])


ODD: list[Any] = [
    True, 0, -1, 2**31, 2**63, 2**64, -(2**70), 0.0, 1e308, "", "x", "nan", "1e999", [], {},
    [None], [[]], {"a": None}, "9" * 39, {"type": "json_schema", "json_schema": 5},
]  # fmt: skip


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_no_value_of_any_type_fails_in_another_way_than_a_refusal(value) -> None:
    for kind, rules in RULES.items():
        for name in rules:
            with suppress(Refusal):
                in_range(kind, **{name: copy.deepcopy(value)})


@pytest.mark.parametrize("kind", ["messages", "count_tokens"])
def test_parts_of_tool_results_are_parts_of_messages(kind: str) -> None:
    results = [{"type": "tool_result", "tool_use_id": "a", "content": [EMPTY] * 4096}] * 2
    assert "8194 parts" in refused(kind, messages=[{"role": "user", "content": results}]).message


TEXT = "What is this?"


def most(kind: str, text: str = TEXT, *, images: int = 0, **fields: object) -> int:
    body = {"messages": [{"role": "user", "content": text}], **fields}
    raw = msgspec.json.encode(body)
    return most_tokens(kind, body, raw, len(raw), images)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("chat", "max_tokens"), ("chat", "max_completion_tokens"), ("completions", "max_tokens"),
        ("generate", "max_tokens"), ("messages", "max_tokens"), ("responses", "max_output_tokens"),
    ],
)  # fmt: skip
def test_an_answer_counts_where_the_route_s_name_states_it(kind: str, name: str) -> None:
    short = most(kind, **{name: 100})
    assert most(kind, **{name: 300}) - short == 200
    assert most(kind, images=256, **{name: 100}) - short == 256
    assert most(kind, TEXT + "x" * 50, **{name: 100}) - short == 50
    assert most(kind) == most(kind, answer_tokens=1) == UNSTATED


def test_of_two_lengths_the_longer_counts_and_tools_twice() -> None:
    assert most("chat", max_tokens=9, max_completion_tokens=90) > most("chat", max_tokens=90)
    tools = [{"type": "function", "function": {"name": "f"}}]
    with_tools = most("chat", max_tokens=1, tools=tools) - most("chat", max_tokens=1)
    assert with_tools >= 2 * len(msgspec.json.encode(tools))


@pytest.mark.parametrize("text", ["\u4e66\u751f", "a\u0301\u00e9", "\u0958" * 40, "\U0001d160" * 9])
def test_a_token_of_a_normalised_text_has_a_byte_at_least(text: str) -> None:
    room = most("chat", text, max_tokens=1) - most("chat", "", max_tokens=1)
    assert room >= len(unicodedata.normalize("NFC", text).encode())


@pytest.mark.parametrize(
    ("kind", "given", "tokens", "stated", "changes"),
    [
        ("chat", {}, 1024, {"max_tokens": 1024}, ["max_tokens=none->1024"]),
        ("responses", {}, 8, {"max_output_tokens": 8}, ["max_output_tokens=none->8"]),
        ("chat", {"max_completion_tokens": 9}, 1024, {"max_completion_tokens": 9}, []),
        ("chat", {}, 0, {}, []),
        ("count_tokens", {}, 1024, {}, []),
    ],
)
def test_an_answer_without_a_stated_length_is_given_one(kind, given, tokens, stated, changes):
    body, said = dict(given), []
    state_answer(kind, body, tokens, said)
    assert (body, said) == (stated, changes)
