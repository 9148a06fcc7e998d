"""Finds the grammar of a request, and limits the bytes and depth of its schemas.

An engine compiles a grammar of schemas and patterns, and the answer follows the grammar. The text
of a grammar does not tell how long this takes. So `gateway.grammar_trials` first compiles each new
grammar.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from turbofit.core.struct import JsonObject
from turbofit.gateway.limits.rules import refused

#: The most bytes of the schemas of a field, since LMDeploy parses schemas on its event loop.
_BYTES: Final = 64 << 10
#: The greatest depth of schemas: how many lists and objects are inside each other.
_DEPTH: Final = 64
#: The most tools of a request. A model's template writes the tools into the prompt: this takes
#: 0.04 s for 64 KiB of tools and 1 s for 1 MiB (`bench/gateway/STALLS.md`).
_TOOLS: Final = 128
#: Fields with schemas, their types in Python, and in JSON.
_FIELDS: Final = {
    "response_format": (dict, "object"), "text": (dict, "object"), "tools": (list, "list"),
}  # fmt: skip
#: The values of ``tool_choice`` that force a call of a tool, in all APIs.
#: lmdeploy lmdeploy/serve/anthropic/adapter.py::normalize_tool_choice #2404e7
_FORCED: Final = ("required", "any")


def grammar_of(body: JsonObject) -> tuple[str, JsonObject] | None:
    """Return the name of the field with a body's grammar, and the grammar as fields of a chat.

    The body may be of any API; the result is None for a body without a grammar. If ``tool_choice``
    forces a call, LMDeploy compiles the tools and no other grammar. For GPT-OSS LMDeploy always
    compiles the tools; this function does not find such a grammar.
    """
    choice, tools = body.get("tool_choice"), body.get("tools")
    if tools and (choice.get("type") if isinstance(choice, dict) else choice) in _FORCED:
        chat = {"tools": [_of_chat(tool) for tool in tools], "tool_choice": "required"}
        return "tools", chat
    field, given = "response_format", body.get("response_format")
    if given is None:
        field, given = "text", body.get("text", {}).get("format")
        if isinstance(given, dict):  # in the Responses API, the schema is in this object itself
            given = {"type": given.get("type"), "json_schema": {"name": "text", **given}}
    if not isinstance(given, dict) or given.get("type") in (None, "text"):
        return None
    return field, {"response_format": given}


def _of_chat(tool: Any) -> Any:
    """Return a tool of any API in the form of a chat, without its description."""
    given = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(given, dict):
        return tool
    parameters = given.get("parameters", given.get("input_schema"))
    return {"type": "function", "function": {"name": given.get("name"), "parameters": parameters}}


def check_grammars(body: JsonObject) -> None:
    """Limit the bytes and depth of a body's schemas, and the number of its tools.

    Raises:
        Refusal: a field is of another type, too long, or nested too deep, or has too many tools.
    """
    for name, (kind, kind_name) in _FIELDS.items():
        if name not in body:
            continue
        value = body[name]
        if not isinstance(value, kind):
            raise refused(name, f"is no {kind_name}")
        if name == "tools" and len(value) > _TOOLS:
            raise refused(name, f"has {len(value)} tools, the limit is {_TOOLS}")
        size = len(msgspec.json.encode(value))
        if size > _BYTES:
            raise refused(name, f"has {size} bytes of schemas, the limit is {_BYTES}")
        if _depth(value) > _DEPTH:
            raise refused(name, f"is nested deeper than {_DEPTH}")


def _depth(value: Any) -> int:
    """Return the depth of lists and objects inside each other; ``value`` has at most 64 KiB."""
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
    return depth
