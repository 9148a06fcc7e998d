"""Values at the edges of a field: from its rule in `turbofit.gateway.limits.parameters`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

from turbofit.gateway.limits.rules import (
    Biases,
    Flag,
    Ids,
    IntegerRule,
    Number,
    Rule,
    Scope,
    TextRule,
    Texts,
)

ABSENT: Final = object()
PATHS: Final = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "generate": "/generate",
    "messages": "/v1/messages",
    "count_tokens": "/v1/messages/count_tokens",
    "responses": "/v1/responses",
    "costly": "/v1/chat/completions",
}
_TALK: Final = [{"role": "user", "content": "Name a colour."}]


def _optional(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(count)}}


def _format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def _deep(levels: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        made = {"type": "object", "properties": {"a": made}, "required": ["a"]}
    return made


#: A request of each kind that is answered.
BASE: Final[dict[str, dict[str, Any]]] = {
    "chat": {"model": "", "messages": _TALK, "max_tokens": 2},
    "completions": {"model": "", "prompt": "A colour:", "max_tokens": 2},
    "generate": {"prompt": "A colour:", "max_tokens": 2},
    "messages": {"model": "", "messages": _TALK, "max_tokens": 2},
    "count_tokens": {"model": "", "messages": _TALK},
    "responses": {"model": "", "input": "Name a colour.", "max_output_tokens": 2},
}

#: Bodies of a chat that cost an event loop much, by name.
COSTLY: Final[dict[str, dict[str, Any]]] = {
    "3 MB of text": {"messages": [{"role": "user", "content": "word " * 600_000}]},
    "255 KiB of text": {"messages": [{"role": "user", "content": "word " * 52_000}]},
    "100,000 messages": {"messages": [{"role": "user", "content": ""}] * 100_000},
    "8,000 messages": {"messages": [{"role": "user", "content": ""}] * 8_000},
    "stop of 1 MB": {"stop": "word " * 200_000},
    "16 stops of 1,024": {"stop": [chr(97 + n) * 1024 for n in range(16)]},
    "1,000 stops": {"stop": [f"stop {n}" for n in range(1000)]},
    "4 stops of a letter": {"stop": list("eait")},
    "a template that loops": {
        "chat_template_kwargs": {
            "chat_template": "{% for a in range(99999) %}{% for b in range(99) %}{% endfor %}"
            "{% endfor %}"
        }
    },
    "64 optional properties": {"response_format": _format(_optional(64))},
    "400 optional properties": {"response_format": _format(_optional(400))},
    "1,000 required properties": {
        "response_format": _format({**_optional(1000), "required": [f"p{n}" for n in range(1000)]})
    },
    "maxLength 100,000": {"response_format": _format({"type": "string", "maxLength": 100_000})},
    "schema 60 deep": {"response_format": _format(_deep(29))},
    "schema 800 deep": {"response_format": _format(_deep(400))},
    "schema of itself": {"response_format": _format({"$ref": "#"})},
    "pattern (.{1,99}){1,99}": {
        "response_format": {"type": "regex_schema", "regex_schema": "(.{1,99}){1,99}"}
    },
    "pattern (a?)x200": {"response_format": {"type": "regex_schema", "regex_schema": "(a?)" * 200}},
    "pattern a{10^9}": {
        "response_format": {"type": "regex_schema", "regex_schema": "a{1000000000}"}
    },
    "pattern 2,000 groups deep": {
        "response_format": {"type": "regex_schema", "regex_schema": "(" * 2000 + ")" * 2000}
    },
    "grammar of a bad pattern": {"response_format": {"type": "regex_schema", "regex_schema": "("}},
}


def edges(rule: Rule, scope: Scope) -> Iterator[tuple[str, Any]]:
    """Named values of a field: those of every field, and least and most of its rule."""
    yield "absent", ABSENT
    yield "null", None
    for number in (0, -1, 2**31, 2**63, math.nan, math.inf):
        yield str(number), number
    yield "wrong type: object", {"odd": ["thing"]}
    yield "wrong type: list", [None, [1]]
    yield "wrong type: text", "nan"
    yield "empty text", ""
    yield "empty list", []
    yield "empty object", {}
    yield "long text", "x" * 300_000
    yield "long list", [0] * 60_000
    yield "long number", 10**300
    yield from _ranged(rule, scope)


def _ranged(rule: Rule, scope: Scope) -> Iterator[tuple[str, Any]]:
    if isinstance(rule, IntegerRule):
        least, most = rule.least, scope.number(rule.most)
        for name, number in (
            ("least", least), ("least-1", least - 1), ("most", most), ("most+1", most + 1),
        ):  # fmt: skip
            yield name, number
    elif isinstance(rule, Number):
        yield "least", rule.least
        yield "least-1", rule.least - 1
        yield "just above least", math.nextafter(rule.least, rule.most)
        yield "most", rule.most
        yield "most+1", rule.most + 1
    elif isinstance(rule, Flag):
        yield "least", False
        yield "most", True
    elif isinstance(rule, Ids):
        last, most = scope.vocabulary - 1, scope.number(rule.most)
        for name, ids in (
            ("least", [0]), ("least-1", [-1]), ("most", [last]), ("most+1", [last + 1]),
            ("2^31", [2**31]), ("2^63", [2**63]), ("longest", [1] * (most - 1)),
            ("longest+2", [1] * (most + 1)),
        ):  # fmt: skip
            yield f"ids: {name}", ids
    elif isinstance(rule, Biases):
        last = scope.vocabulary - 1
        for name, one in (("least", 0), ("least-1", -1), ("most", last), ("most+1", last + 1)):
            yield f"ids: {name}", {str(one): 1}
        yield "bias 10^9", {"1": 1e9}
        yield "longest", {str(one): 1 for one in range(rule.most)}
    elif isinstance(rule, Texts) and rule.most and rule.characters:
        yield "longest", [f"{n:04d}" * (rule.characters // 4) for n in range(rule.most)]
        yield "one more", [f"{n:04d}" for n in range(rule.most + 1)]
    elif isinstance(rule, TextRule) and rule.most:
        yield "longest", "x" * rule.most
