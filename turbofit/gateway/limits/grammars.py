"""Limits the time to compile grammars: LMDeploy compiles schemas and patterns on its event loop.

With these limits a request's grammars take about 5 s of one core at most, mostly far less (XGrammar
0.2.8, `bench/gateway/GRAMMARS.md`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from turbofit.gateway.limits.request_limits import shown
from turbofit.gateway.limits.rules import refused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.core.struct import JsonObject

#: Bytes of all schemas of a request, and the depth of their nesting (100: 0.7 s, 400: over 40 s).
_BYTES: Final = 64 << 10
_DEPTH: Final = 64
#: The most optional fields of an object; of several objects the squares are added. 100: 1.2 s.
_OPTIONAL: Final = 100
#: Repetitions of all patterns of a request: each ``?``, ``*`` and ``+``, and the numbers of
#: ``{2,5}``, ``minLength`` and ``maxLength``. ``.{1,64}`` takes 5.4 s, ``(a?)`` 64 times 3.4 s.
_REPETITIONS: Final = 64
#: The most tools of a request; a model's template writes each of them into the prompt, which takes
#: 0.04 s for 64 KiB of them and 1 s for a MiB (`bench/gateway/STALLS.md`).
_TOOLS: Final = 128

_LENGTHS: Final = ("minLength", "maxLength")
_REPEATED: Final = re.compile(r"[?*+]|\{\s*(\d*)\s*,?\s*(\d*)\s*\}")


def check_format(body: JsonObject) -> list[str]:
    """Limit the grammars of a body in place; return changes like ``maxLength=200->none``.

    The grammars are in ``response_format`` or ``text``.

    Raises:
        Refusal: the field is no object, or compiling its grammar would take too long.
    """
    changes: list[str] = []
    for name in ("response_format", "text"):
        value = body.get(name)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise refused(name, "is no object")
        changes += _bound(name, value)
    return changes


def check_tools(tools: Any) -> list[str]:
    """Limit the grammars of tools in place; return changes like ``maxLength=200->none``.

    Raises:
        Refusal: the tools are no list or too many, or compiling their grammars takes too long.
    """
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise refused("tools", "is no list")
    if len(tools) > _TOOLS:
        raise refused("tools", f"has {len(tools)} tools, the limit is {_TOOLS}")
    return _bound("tools", tools)


def _bound(name: str, value: Any) -> list[str]:
    """Refuse schemas that are slow to compile.

    If they are slow only because of limits such as ``maxLength``, remove these limits instead, and
    return the changes.
    """
    size = len(msgspec.json.encode(value))
    if size > _BYTES:
        raise refused(name, f"has {size} bytes of schemas, the limit is {_BYTES}")
    schemas, optional, repeated = list(_objects(name, value)), 0, 0
    for schema in schemas:
        properties, required = schema.get("properties"), schema.get("required")
        if isinstance(properties, dict):
            needed = required if isinstance(required, list) else []
            optional += len(properties.keys() - {n for n in needed if isinstance(n, str)}) ** 2
        for word in ("pattern", "regex_schema"):
            if isinstance(pattern := schema.get(word), str):
                repeated += repetitions(pattern)
    if optional > _OPTIONAL**2:
        raise refused(
            name,
            f"has more than {_OPTIONAL} optional properties in one object, or as many by their"
            " squares in several: require some of them",
        )
    if repeated > _REPETITIONS:
        raise refused(
            name, f"has {repeated} repetitions in patterns, as {{1,9}}, the limit is {_REPETITIONS}"
        )
    counted = [
        (schema, word)
        for schema in schemas
        for word in _LENGTHS
        if isinstance(schema.get(word), int | float)
    ]
    if repeated + sum(schema[word] for schema, word in counted) <= _REPETITIONS:
        return []
    return [f"{word}={shown(schema.pop(word))}->none" for schema, word in counted]


def repetitions(pattern: str) -> int:
    """Count the repetitions that a pattern allows: ``a?`` is one, ``a{2,5}`` is five.

    A ``?`` or ``{`` that a backslash escapes counts, too.
    """
    return sum(
        max(1, *(int(digits or 0) for digits in match.groups("")))
        for match in _REPEATED.finditer(pattern)
    )


def _objects(name: str, value: Any) -> Iterator[dict[str, Any]]:
    """Yield all objects inside a value, since each object may be a schema; refuse deep nesting."""
    level: list[Any] = [value]
    for _ in range(_DEPTH):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                yield item
            deeper.extend(item.values() if isinstance(item, dict) else item)
        level = [item for item in deeper if isinstance(item, dict | list)]
        if not level:
            return
    raise refused(name, f"is nested deeper than {_DEPTH}")
