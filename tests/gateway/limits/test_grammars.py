"""The grammar of a request of each API, and the bytes and depth of its schemas."""

from __future__ import annotations

from typing import Any

import pytest

from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.grammars import check_grammars, grammar_of

SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 60}}}
CALL = {"name": "f", "parameters": SCHEMA}
FORCED = {"tools": [{"type": "function", "function": CALL}], "tool_choice": "required"}


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def pattern(text: str) -> dict[str, str]:
    return {"type": "regex_schema", "regex_schema": text}


@pytest.mark.parametrize(
    "given", [form(SCHEMA), pattern("[a-z]{1,9}"), {"type": "json_object"}, {"type": "unheard of"}]
)
def test_the_format_of_a_chat_is_its_grammar_as_it_came(given):
    assert grammar_of({"response_format": given}) == ("response_format", {"response_format": given})


def test_the_responses_api_has_its_schema_in_the_format_itself():
    text = {"format": {"type": "json_schema", "name": "y", "schema": SCHEMA, "strict": True}}
    field, chat = grammar_of({"text": text})
    assert field == "text"
    given = chat["response_format"]
    assert (given["type"], given["json_schema"]["schema"]) == ("json_schema", SCHEMA)
    assert given["json_schema"]["name"] == "y"


@pytest.mark.parametrize(
    ("tool", "choice"),
    [
        ({"type": "function", "function": {**CALL, "description": "long"}}, "required"),
        ({"type": "function", **CALL}, "required"),  # the Responses API
        ({"name": "f", "input_schema": SCHEMA}, {"type": "any"}),  # the Messages API
        ({"name": "f", "input_schema": SCHEMA}, "any"),
    ],
)
def test_tools_of_every_api_are_one_grammar_where_a_call_is_forced(tool, choice):
    body = {"tools": [tool], "tool_choice": choice, "response_format": form({})}
    assert grammar_of(body) == ("tools", FORCED)


@pytest.mark.parametrize(
    "body",
    [
        {}, {"response_format": {"type": "text"}}, {"text": {}}, {"text": {"verbosity": "low"}},
        {"text": {"format": {"type": "text"}}}, {"response_format": {}},
        {**FORCED, "tool_choice": "auto"}, {"tools": FORCED["tools"]}, {"tool_choice": "required"},
        {**FORCED, "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {**FORCED, "tools": []},
    ],
)  # fmt: skip
def test_no_grammar_where_lmdeploy_compiles_none(body):
    assert grammar_of(body) is None


@pytest.mark.parametrize("tool", ["f", None, {"function": 5}, 7])
def test_what_is_no_tool_is_left_to_lmdeploy(tool):
    _, chat = grammar_of({"tools": [tool], "tool_choice": "required"})
    assert chat["tools"] == [tool]


def nested(levels: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        made = {"type": "array", "items": made}
    return made


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": form(nested(61))}, {"response_format": pattern("." * 60_000)},
        {"response_format": form({"maxLength": 10**9, "pattern": "(a?){1,99}" * 99})},
        {"tools": [CALL] * 128}, {"text": {}}, {},
    ],
)  # fmt: skip
def test_no_words_are_counted_only_bytes_and_depth(body):
    check_grammars(body)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"response_format": form(nested(62))}, "response_format is nested deeper than 64"),
        ({"tools": [nested(64)]}, "tools is nested deeper than 64"),
        ({"text": {"format": {"enum": ["x" * 70_000]}}}, "text has 70"),
        ({"response_format": "json"}, "response_format is no object"), ({"text": []}, "no object"),
        ({"tools": {}}, "tools is no list"), ({"tools": [CALL] * 129}, "has 129 tools"),
    ],
)  # fmt: skip
def test_what_is_too_long_or_deep_is_refused(body, word):
    with pytest.raises(Refusal) as caught:
        check_grammars(body)
    assert (caught.value.status, caught.value.param) == (400, next(iter(body)))
    assert word in caught.value.message
