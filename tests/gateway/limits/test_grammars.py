from __future__ import annotations

from typing import Any

import pytest

from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits import grammars
from turbofit.gateway.limits.grammars import (
    check_format,
    check_tools,
    grammar_seconds,
    pattern_weight,
    refuse_grammars,
)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch) -> None:
    monkeypatch.setattr(grammars.os, "sched_getaffinity", lambda _: {0, 1})


def schema(count: int, *, required: bool = True, **value: Any) -> dict[str, Any]:
    names = [f"p{number}" for number in range(count)]
    return {
        "type": "object",
        "properties": {name: {"type": "string", **value} for name in names},
        "required": names if required else [],
    }


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize(
    ("priced", "measured"),
    [
        # Seconds of one core of XGrammar 0.2.8, see `bench/gateway/GRAMMARS.md`.
        (schema(10), 0.045),
        (schema(200), 0.157),
        (schema(1000), 0.572),
        (schema(50, required=False), 0.385),
        (schema(80, required=False), 0.756),
        (schema(100, required=False), 1.205),
        ({"type": "string", "minLength": 50}, 2.254),
        ({"type": "string", "minLength": 1000}, 5.258),
        ({"type": "string", "pattern": "[a-z]{1,100}"}, 0.794),
        ({"type": "string", "pattern": "[a-z]{1,1000}"}, 1.4),
        ({"type": "string", "pattern": ".{1,100}"}, 7.315),
        ({"enum": [f"value number {number}" for number in range(5000)]}, 0.125),
    ],
)
def test_the_price_is_at_least_what_was_measured(priced, measured) -> None:
    assert grammar_seconds("response_format", form(priced)) + 1.3e-6 * 103_900 >= measured


def test_ordinary_formats_pass_as_they_are() -> None:
    for value in (
        {"type": "text"},
        {"type": "json_object"},
        form(schema(50)),
        form(schema(30, required=False)),
        {"type": "regex_schema", "regex_schema": r"call me [A-Za-z]{1,10} at \d{3}-\d{4}"},
    ):
        assert check_format({"response_format": value}) == []
    assert check_tools([{"type": "function", "function": {"name": "f", "parameters": {}}}]) == []


def test_lengths_of_strings_are_left_out_where_they_cost_too_much() -> None:
    value = form(schema(2, maxLength=200))
    assert check_format({"response_format": value}) == ["maxLength=200->none"] * 2
    assert value == form(schema(2))
    # A property may be called so.
    named = form({"type": "object", "properties": {"maxLength": {"type": "integer"}}})
    assert check_format({"response_format": named}) == []


def deep(levels: int) -> dict[str, Any]:
    nested: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        nested = {"type": "array", "items": nested}
    return nested


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"response_format": form(schema(200, required=False))}, "s of one core"),
        ({"response_format": {"type": "regex_schema", "regex_schema": "(.{1,99}){1,99}"}}, "s of"),
        ({"response_format": {"type": "regex_schema", "regex_schema": "a{1000000000000}"}}, "s of"),
        ({"response_format": {"type": "regex_schema", "regex_schema": "a" * 5000}}, "5000 char"),
        ({"response_format": form(deep(100))}, "deeper than 64"),
        ({"response_format": form({"enum": ["x" * 70000]})}, "bytes of schemas"),
        ({"response_format": "json"}, "no object"),
        ({"response_format": form(5)}, "schema that is no object"),
        ({"text": {"format": {"type": "json_schema", "schema": 5}}}, "schema that is no object"),
        ({"text": {"format": 5}}, "format that is no object"),
    ],
)
def test_what_costs_too_much_is_refused(body, word) -> None:
    with pytest.raises(Refusal) as caught:
        check_format(body)
    assert caught.value.status == 400
    assert word in caught.value.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": form({})}, "response_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "regex_schema", "regex_schema": "a"}}, "response_format"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format"),
        ({"tools": [{}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{}], "tool_choice": {"type": "any"}}, "tool_choice"),
    ],
)
def test_what_needs_xgrammar_is_refused_with_how_to_install_it(body: Any, param: str) -> None:
    with pytest.raises(Refusal, match="pip install xgrammar") as caught:
        refuse_grammars(body)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    "body",
    [
        {}, {"response_format": {"type": "text"}}, {"response_format": {"type": "structural_tag"}},
        {"response_format": None}, {"text": {"format": {"type": "text"}}}, {"text": {}},
        {"text": "x"}, {"tools": [{}], "tool_choice": "auto"}, {"tools": [{}]},
        {"tool_choice": "required"}, {"response_format": {"type": ["json_object"]}},
        {"tools": [{}], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    ],
)  # fmt: skip
def test_what_needs_no_xgrammar_is_left_to_lmdeploy(body: Any) -> None:
    refuse_grammars(body)


@pytest.mark.parametrize(
    ("pattern", "weight", "loops"),
    [
        ("", 0, 0),
        ("abc", 3, 0),
        ("a{3}", 3, 0),
        ("a{2,5}", 5, 0),
        ("a{2,}", 2, 0),
        ("[a-z]{1,100}", 1600, 0),
        (r"[^\]a]x", 161, 0),
        (".{10}", 1600, 0),
        (r"\d\S\\", 16 + 160 + 1, 0),
        ("(ab){10}", 30, 0),
        ("(a{10}){10}", 110, 0),
        ("a?b*c+", 3, 3),
        ("(a?){40}", 80, 40),
        ("((a?){4}){5}", 45, 20),
        ("(a", 1, 0),
        ("a)", 2, 0),
        ("[a", 17, 0),
        ("{x}", 3, 0),
    ],
)
def test_weight_and_loops(pattern, weight, loops) -> None:
    assert pattern_weight(pattern, 10**6) == (weight, loops)


def test_counting_ends_past_the_limit() -> None:
    assert pattern_weight("(a{1000}){1000}" * 1000, 5000)[0] < 10**9
    assert pattern_weight("a{99999999999999999999}", 5000)[0] > 5000
