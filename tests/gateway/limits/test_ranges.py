"""Each parameter held to the range that engines survive."""

from __future__ import annotations

import copy
import json
import unicodedata
from contextlib import suppress
from typing import Any

import msgspec
import pytest

from tests.support.gateway import ask, chat, gateway
from turbofit.cli.options.field_options import filled
from turbofit.core.errors import UsageError
from turbofit.gateway.config import GatewayOptions
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.defaults import Defaults
from turbofit.gateway.limits.gate import UNSTATED
from turbofit.gateway.limits.ranges import RULES, hold_parameters, lower_answer, most_tokens
from turbofit.gateway.limits.request_body import read_body
from turbofit.gateway.limits.rules import Scope


def of(engine: str) -> Scope:
    return Scope(engine=engine, vocabulary=512, session=4096)


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


@pytest.mark.parametrize(
    ("kind", "name", "asked", "given", "notes"),
    [
        ("chat", "top_k", 1025, 1024, ["top_k=1025->1024"]),
        ("generate", "top_k", 2**63, 1024, ["top_k=9223372036854775808->1024"]),
        ("messages", "top_k", 10**30, 1024, ["top_k=huge->1024"]),
        ("generate", "repetition_ngram_size", 1025, 1024, ["repetition_ngram_size=1025->1024"]),
        ("chat", "repetition_ngram_size", 1024, 1024, []),
        ("chat", "n", 3.0, 3, []),
        ("completions", "n", True, 1, []),
        ("chat", "seed", -1, 2**64 - 1, ["seed=-1->18446744073709551615"]),
        ("chat", "seed", 2**64, 0, ["seed=huge->0"]),
        ("chat", "min_new_tokens", 2**31, 4096, ["min_new_tokens=2147483648->4096"]),
        ("chat", "max_tokens", 64000, 4096, ["max_tokens=64000->4096"]),
        ("responses", "max_output_tokens", 10**30, 4096, ["max_output_tokens=huge->4096"]),
        ("chat", "temperature", 1e-300, 0.01, ["temperature=1e-300->0.01"]),
        ("chat", "temperature", "0.5", 0.5, []),
        ("chat", "presence_penalty", 9, 2, ["presence_penalty=9->2"]),
        # LMDeploy's own tests send 1e-7.
        ("chat", "repetition_penalty", 1e-7, 0.01, ["repetition_penalty=1e-07->0.01"]),
        ("generate", "top_logprobs_num", 5000, 1024, ["top_logprobs_num=5000->1024"]),
        ("generate", "stop_token_ids", [0, 511], [0, 511], []),
        ("chat", "logit_bias", {"5": 300, "6": -1}, {"5": 100, "6": -1}, []),
        ("chat", "stream", "yes", True, []),
        ("chat", "ignore_eos", 0, False, []),
    ],
)  # fmt: skip
def test_what_can_be_brought_into_its_range_is_and_is_said(kind, name, asked, given, notes) -> None:
    body, words = in_range(kind, **{name: asked})
    assert (body[name], words) == (given, notes)
    assert type(body[name]) is type(given) or not isinstance(given, int)


EMPTY = {"type": "text", "text": ""}


@pytest.mark.parametrize(
    ("kind", "name", "asked", "word"),
    [
        ("chat", "top_k", -1, "between 0 and 1024"),
        ("chat", "n", 0, "between 1 and 2147483647"),
        ("completions", "n", 2**40, "between 1 and 2147483647"),
        ("chat", "n", 1.5, "no whole number"),
        ("chat", "top_k", "x", "is x, no whole number"),
        ("chat", "top_k", [1], "no whole number"),
        ("chat", "temperature", 2.01, "at most 2"),
        ("messages", "temperature", 1.01, "at most 1"),
        ("chat", "temperature", "nan", "no finite number"),
        ("chat", "top_p", 0, "above 0"),
        ("completions", "min_p", 2, "at most 1"),
        ("generate", "min_p", -0.1, "at least 0"),
        ("chat", "max_tokens", 0, "between 1 and 4096"),
        ("chat", "top_logprobs", 21, "between 0 and 20"),
        ("completions", "logprobs", 1, "is not taken here"),
        ("completions", "prompt", "", "is empty"),
        ("completions", "prompt", ["a", ""], "is empty"),
        ("generate", "stop_token_ids", [-1], "token id -1, ids are between 0 and 511"),
        ("generate", "stop_token_ids", list(range(33)), "33 token ids, the limit is 32"),
        ("generate", "stop_token_ids", "12", "no list"),
        ("chat", "input_ids", [10**9], "ids are between 0 and 511"),
        ("chat", "input_ids", [1] * 4097, "4097 token ids, the limit is 4096"),
        ("chat", "logit_bias", {"512": 1}, "ids are between 0 and 511"),
        ("chat", "logit_bias", {"1": "nan"}, "no finite number"),
        ("chat", "logit_bias", [1], "no object"),
        ("chat", "stop", "", "is empty"),
        ("chat", "stop", "x" * 1025, "1025 characters, the limit is 1024"),
        ("chat", "stop", [f"stop{i}" for i in range(17)], "17 strings, the limit is 16"),
        ("chat", "stop", list("abcde"), "5 strings of less than 3 characters, the limit is 4"),
        ("chat", "stop", [1], "no string"),
        ("chat", "stream", "maybe", "neither true nor false"),
        ("chat", "model", 7, "no string"),
        ("chat", "user", "x" * 5000, "5000 characters"),
        ("chat", "chat_template_kwargs", {"chat_template": "{{ x }}"}, "may not hold"),
        ("responses", "input", [{"role": "user", "content": "x"}] * 4097, "4097 messages"),
        ("chat", "messages", [{"role": "user", "content": [EMPTY] * 8193}], "8193 parts"),
        ("chat", "tools", [{}] * 129, "129 tools"),
        ("responses", "input", ["x"], "no object"),
        ("responses", "include", ["x"] * 257, "257 items, the limit is 256"),
        ("messages", "metadata", {str(n): n for n in range(300)}, "300 items"),
    ],
)
def test_what_cannot_is_refused_with_the_range(kind, name, asked, word) -> None:
    refusal = refused(kind, **{name: asked})
    assert refusal.param == name
    assert word in refusal.message


def test_engines_differ_where_they_do() -> None:
    assert in_range("chat", of("pytorch"), top_k=1000)[0]["top_k"] == 512
    assert in_range("chat", top_k=1000)[0]["top_k"] == 1000
    assert in_range("chat", of("transformers"), stop=[])[0]["stop"] is None


@pytest.mark.parametrize(
    ("engine", "fields", "word"),
    [
        # LMDeploy cannot pickle what it makes of it, and answers 500.
        ("pytorch", {"logit_bias": {"5": 1.0}}, "cannot send it to its PyTorch engine"),
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


QUIET = {"enable_thinking": False}
SAMPLING = {"temperature": 0.2, "top_k": 20, "max_tokens": 64}
DEFAULTS = Defaults(template=QUIET, sampling=SAMPLING)


def laid(kind: str, defaults: Defaults = DEFAULTS, **body: Any) -> dict[str, Any]:
    defaults.complete(kind, body)
    return body


@pytest.mark.parametrize(
    ("kind", "added"),
    [
        ("chat", {**SAMPLING, "chat_template_kwargs": QUIET}), ("completions", SAMPLING),
        ("generate", SAMPLING), ("messages", SAMPLING), ("count_tokens", {}),
        ("responses", {"temperature": 0.2, "top_k": 20, "max_output_tokens": 64}),
    ],
)  # fmt: skip
def test_each_route_gets_what_its_request_model_has(kind: str, added: dict[str, Any]) -> None:
    assert laid(kind) == added


def test_what_a_client_says_stays_and_null_says_nothing() -> None:
    given = {"temperature": 0, "max_completion_tokens": 9, "chat_template_kwargs": {"tone": "dry"}}
    assert laid("chat", **given, top_k=None) == {
        **given, "top_k": 20, "chat_template_kwargs": {**QUIET, "tone": "dry"},
    }  # fmt: skip
    for own in ({"enable_thinking": True}, "x"):
        assert laid("chat", chat_template_kwargs=own)["chat_template_kwargs"] == own
    # LMDeploy lets the argument win over ``enable_thinking`` beside it.
    assert laid("chat", enable_thinking=True)["chat_template_kwargs"] == {}


def test_a_value_beyond_a_route_s_range_is_not_laid_there() -> None:
    warm = {"temperature": 1.5}
    assert laid("chat", Defaults(sampling=warm)) == warm
    assert laid("messages", Defaults(sampling=warm)) == {}


def test_limits_and_the_engine_see_them() -> None:
    app, upstream = gateway(default_chat_template_kwargs=QUIET, default_sampling=SAMPLING)
    assert ask(app, body=chat()).status == 200
    assert upstream.bodies == [{**chat(), **SAMPLING, "chat_template_kwargs": QUIET}]
    app, _ = gateway(default_sampling={"max_tokens": 1 << 20})
    assert "max_tokens=1048576->" in ask(app, body=chat()).headers["x-turbofit-limited"]


@pytest.mark.parametrize(
    ("option", "text", "words"),
    [
        ("sampling", '{"temperature": 3}', "temperature is 3.0, it must be at least 0 and at most"),
        ("sampling", '{"temperature": 0.001}', "temperature=0.001->0.01"),
        ("sampling", '{"max_tokens": 0}', "max_tokens is 0, it must be at least 1"),
        ("sampling", '{"temprature": 1}', "--default-sampling has no 'temprature'"),
        ("sampling", "[1]", "is no JSON object"),
        ("chat_template_kwargs", "enable_thinking=false", "is no JSON object"),
        ("chat_template_kwargs", '{"chat_template": "x"}', "may not hold 'chat_template'"),
        ("chat_template_kwargs", json.dumps(dict.fromkeys("a" * n for n in range(65))), "65"),
    ],
)
def test_wrong_ones_are_refused_by_the_option_s_name(option: str, text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        filled(GatewayOptions, {f"default_{option}": text})
    assert words in caught.value.message
    assert f"--default-{option.replace('_', '-')}" in caught.value.message
