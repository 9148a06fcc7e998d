"""Bounds the cost of grammars: LMDeploy compiles schemas and patterns on its event loop.

The costs are seconds of one core, for XGrammar 0.2.8 and 151,643 tokens (the table is in
`bench/gateway/GRAMMARS.md`), each at its upper end. XGrammar compiles with up to eight
threads, so a second of the loop is worth as many seconds of one core as there are cores, up to
eight.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import msgspec

from turbofit.core.struct import NA
from turbofit.gateway.limits.request_limits import shown
from turbofit.gateway.limits.rules import refused
from turbofit.machine.host import usable_cores

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.core.json_types import JsonObject

#: Bytes of all schemas of a request, and the depth of their nesting (100: 0.7 s, 400: over 40 s).
_BYTES: Final = 64 << 10
_DEPTH: Final = 64
#: The most characters of one pattern.
_PATTERN: Final = 4096
#: The most tools of a request; a model's template writes each of them into the prompt, which takes
#: 0.04 s for 64 KiB of them and 1 s for a MiB (`bench/gateway/STALLS.md`).
_TOOLS: Final = 128

_BASE: Final = 0.05
_PROPERTY: Final = 0.001
#: Seconds by the square of an object's optional properties: 50 take 0.39 s, 100 take 1.2 s.
_OPTIONAL_SQUARED: Final = 1.6e-4
#: Seconds by a string's counted length: 50 take 2.3 s, ``.{1,100}`` 7.3 s, and more no longer.
_LENGTH: Final = 0.08
_MOST_LENGTH: Final = 95
#: Seconds by a pattern's weight: ``[a-z]{1,100}`` takes 0.8 s.
_WEIGHT: Final = 5e-4
_LOOPS_SQUARED: Final = 1e-3
_MOST_WEIGHT: Final = 1 << 20
_BYTE: Final = 1.3e-6

_LENGTHS: Final = ("minLength", "maxLength")
_MOST_THREADS: Final = 8
_COUNTED: Final = re.compile(r"\{\s*(\d*)\s*(,?)\s*(\d*)\s*\}")
#: Weights of an atom that nearly all tokens match, and of one that many match: see above.
_WIDE: Final = 160
_CLASS_WEIGHT: Final = 16
_CLASS: Final = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")


def check_format(body: JsonObject) -> list[str]:
    """Bound ``response_format`` or ``text`` in place; returns changes like ``maxLength=200->none``.

    Raises:
        Refusal: it is no object, or compiling it would take too long.
    """
    changes: list[str] = []
    for name in ("response_format", "text"):
        value = body.get(name)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise refused(name, "is no object")
        _check_schema_type(name, value)
        changes += _bound(name, value)
    return changes


@cache
def lacks_xgrammar() -> bool:
    """Whether LMDeploy, which has this process's packages, cannot compile the form of an answer."""
    return find_spec("xgrammar") is None


def forces_form(body: JsonObject) -> bool:
    """Whether an answer must follow a schema, or be the call of a tool."""
    text, choice = body.get("text"), body.get("tool_choice")
    form = text.get("format") if isinstance(text, dict) else body.get("response_format")
    if isinstance(form, dict) and form.get("type") != "text":
        return True
    word = choice.get("type") if isinstance(choice, dict) else choice
    return word in ("required", "any", "tool", "function")


def check_tools(tools: Any) -> list[str]:
    """Bound the schemas of tools, in place; returns changes as `check_format` does.

    Raises:
        Refusal: the tools are no list, too many, or compiling them would take too long.
    """
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise refused("tools", "is no list")
    if len(tools) > _TOOLS:
        raise refused("tools", f"has {len(tools)} tools, the limit is {_TOOLS}")
    return _bound("tools", tools)


def grammar_seconds(name: str, value: Any) -> float:
    """The cost of compiling all schemas and patterns in a value, in seconds of one core.

    Raises:
        Refusal: a pattern is too long.
    """
    seconds = _BASE
    for schema in _objects(name, value):
        properties, required = schema.get("properties"), schema.get("required")
        if isinstance(properties, dict):
            needed = required if isinstance(required, list) else []
            optional = properties.keys() - {field for field in needed if isinstance(field, str)}
            seconds += _PROPERTY * len(properties) + _OPTIONAL_SQUARED * len(optional) ** 2
        longest = max((0, *(schema[word] for word in _lengths(schema))))
        seconds += _LENGTH * min(_MOST_LENGTH, longest)
        for word in ("pattern", "regex_schema"):
            pattern = schema.get(word)
            if not isinstance(pattern, str):
                continue
            if (size := len(pattern)) > _PATTERN:
                raise refused(name, f"has a pattern of {size} characters, the limit is {_PATTERN}")
            weight, loops = pattern_weight(pattern, _MOST_WEIGHT)
            seconds += _WEIGHT * weight + _LOOPS_SQUARED * loops**2
    return seconds


def _bound(name: str, value: Any) -> list[str]:
    """Leave out counted lengths of strings if they make compiling too slow; returns changes."""
    size = len(msgspec.json.encode(value))
    if size > _BYTES:
        raise refused(name, f"has {size} bytes of schemas, the limit is {_BYTES}")
    most, changes = threads_here(), []
    while (seconds := grammar_seconds(name, value) + _BYTE * size) > most:
        counted = [(schema, word) for schema in _objects(name, value) for word in _lengths(schema)]
        if not counted:
            raise refused(
                name,
                f"would take about {seconds:.1f} s of one core to compile, the limit is {most} (no "
                "other request is answered meanwhile); many optional properties of one object and "
                "counted repetitions as .{1,99} cost most",
            )
        changes += [f"{word}={shown(schema.pop(word))}->none" for schema, word in counted]
    return changes


@cache
def threads_here() -> int:
    """The number of XGrammar's threads that have cores; it may start more than a cgroup's quota."""
    cores = usable_cores()
    return 1 if cores == NA else min(int(cores), _MOST_THREADS)


def _lengths(schema: dict[str, Any]) -> list[str]:
    return [word for word in _LENGTHS if isinstance(schema.get(word), int | float)]


def _check_schema_type(name: str, value: dict[str, Any]) -> None:
    """Refuse a schema of another type, for which LMDeploy's Responses API answers 500."""
    inner = value.get("format") if name == "text" else value.get("json_schema")
    if inner is not None and not isinstance(inner, dict):
        raise refused(name, "holds a format that is no object")
    schema = inner.get("schema") if inner else None
    if schema is not None and not isinstance(schema, dict):
        raise refused(name, "holds a schema that is no object")


def _objects(name: str, value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a value; each is treated as a schema."""
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


def pattern_weight(pattern: str, most: int) -> tuple[int, int]:
    """The weight of a pattern with repeats written out (``x{2,5}`` is five ``x``), and its loops.

    Nested repeats multiply. A letter weighs 1; a class, which many tokens match, 16; ``.`` and
    other classes that nearly all tokens match, 160. Loops are ``?``, ``*`` and ``+``. Over for
    alternatives, of which only one is matched.
    """
    outer: list[tuple[int, int]] = []
    size = last = loops = last_loops = index = 0
    while index < len(pattern) and size <= most:
        letter = pattern[index]
        counted = _COUNTED.match(pattern, index) if letter == "{" else None
        if counted is not None:
            least, _, upper = counted.groups()
            times = max(_number(least, most), _number(upper, most), 1)
            size, last = size + last * (times - 1), last * times
            loops, last_loops = loops + last_loops * (times - 1), last_loops * times
            index = counted.end()
        elif letter == "(":
            outer.append((size, loops))
            size = last = loops = last_loops = 0
            index += 1
        elif letter == ")" and outer:
            last, last_loops = size + 1, loops
            before, loops_before = outer.pop()
            size, loops = before + last, loops_before + last_loops
            index += 1
        elif letter in "?*+":
            loops, last_loops = loops + 1, last_loops + 1
            index += 1
        else:
            last, index = _atom(pattern, index)
            size, last_loops = size + last, 0
    return size + sum(part for part, _ in outer), loops + sum(part for _, part in outer)


def _atom(pattern: str, index: int) -> tuple[int, int]:
    """The weight of the atom at ``index``, and the index of the next one."""
    letter = pattern[index]
    if letter == "[":
        whole = _CLASS.match(pattern, index)
        weight = _WIDE if pattern.startswith("[^", index) else _CLASS_WEIGHT
        return weight, whole.end() if whole else index + 1
    if letter == "\\":
        named = pattern[index + 1 : index + 2]
        weight = _WIDE if named in tuple("DSWPX") else _CLASS_WEIGHT
        return (weight if named in tuple("DSWPXdswpbh") else 1), index + 2
    return (_WIDE if letter == "." else 1), index + 1


def _number(digits: str, most: int) -> int:
    return most + 1 if len(digits) > len(str(most)) else int(digits or 0)
