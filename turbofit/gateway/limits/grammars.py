"""Finds the grammars of a request, and limits their bytes and depth.

Engines compile grammars: schemas and patterns that an answer must follow. How long this takes is
seen by neither their size nor their words, so `gateway.grammar_trials` compiles each new one first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from turbofit.core.struct import Struct
from turbofit.gateway.limits.rules import refused

if TYPE_CHECKING:
    from turbofit.core.struct import JsonObject

#: Bytes of all schemas of a field, and the depth of their nesting: LMDeploy parses them on its
#: event loop.
_BYTES: Final = 64 << 10
_DEPTH: Final = 64
#: The most tools of a request; a model's template writes each of them into the prompt, which takes
#: 0.04 s for 64 KiB of them and 1 s for a MiB (`bench/gateway/STALLS.md`).
_TOOLS: Final = 128
#: Values of ``tool_choice`` that force a call: OpenAI's, and the two of the Messages API.
#: lmdeploy lmdeploy/serve/anthropic/adapter.py::normalize_tool_choice #2404e7
_FORCED: Final = ("required", "any")


class Grammar(Struct):
    """What an engine compiles for a request: the field, and the parts of a chat that decide it."""

    field: str
    chat: dict[str, Any]


def grammar_of(body: JsonObject, *, every_tool: bool = False) -> Grammar | None:
    """Return the grammar of a body of any API, or None if an engine compiles none for it.

    LMDeploy compiles tools if ``tool_choice`` forces a call, and then no other grammar.
    ``every_tool``: it compiles tools unless ``tool_choice`` is ``none``, as for GPT-OSS.
    """
    choice, tools = body.get("tool_choice"), body.get("tools")
    named = choice.get("type") if isinstance(choice, dict) else choice
    if tools and (named in _FORCED or (every_tool and named != "none")):
        chat = {"tools": [_of_chat(tool) for tool in tools], "tool_choice": "required"}
        return Grammar("tools", chat)
    value = body.get("response_format")
    if value is not None:
        field = "response_format"
    else:
        field, value = "text", (body.get("text") or {}).get("format")
        if isinstance(value, dict) and "schema" in value:
            value = {"type": value.get("type"), "json_schema": {"name": "text", **value}}
    if not isinstance(value, dict) or value.get("type", "text") == "text":
        return None
    return Grammar(field, {"response_format": value})


def _of_chat(tool: Any) -> Any:
    """Return a tool of any API in the form of a chat, without its description."""
    given = tool.get("function", tool) if isinstance(tool, dict) else {}
    if not isinstance(given, dict):
        return tool
    parameters = given.get("parameters", given.get("input_schema"))
    function = {"name": given.get("name"), "parameters": parameters}
    return {"type": "function", "function": function}


def check_format(body: JsonObject) -> None:
    """Limit bytes and depth of the grammars in ``response_format`` and ``text``.

    Raises:
        Refusal: the field is no object, too long, or nested too deep.
    """
    for name in ("response_format", "text"):
        value = body.get(name)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise refused(name, "is no object")
        _check(name, value)


def check_tools(tools: Any) -> None:
    """Limit the number of tools, and bytes and depth of their schemas.

    Raises:
        Refusal: the tools are no list, too many, too long, or nested too deep.
    """
    if tools is None:
        return
    if not isinstance(tools, list):
        raise refused("tools", "is no list")
    if len(tools) > _TOOLS:
        raise refused("tools", f"has {len(tools)} tools, the limit is {_TOOLS}")
    _check("tools", tools)


def _check(name: str, value: Any) -> None:
    size = len(msgspec.json.encode(value))
    if size > _BYTES:
        raise refused(name, f"has {size} bytes of schemas, the limit is {_BYTES}")
    level = [value]
    for _ in range(_DEPTH):
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise refused(name, f"is nested deeper than {_DEPTH}")
