"""Bodies of each kind, and bodies that cost an event loop much, for `test_serve_pretend`."""

from __future__ import annotations

from typing import Any, Final

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
