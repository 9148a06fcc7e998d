"""What a regular expression weighs once its counted repetitions are written out."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["pattern_weight"]

_COUNTED: Final = re.compile(r"\{\s*(\d*)\s*(,?)\s*(\d*)\s*\}")
#: Of an atom that nearly all tokens match, and of one that many match: `grammars` has the figures.
_WIDE: Final = 160
_CLASS_WEIGHT: Final = 16
_CLASS: Final = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")


def pattern_weight(pattern: str, most: int) -> tuple[int, int]:
    """Weight of a pattern once ``x{2,5}`` is five of ``x``, nested ones multiplied; and its loops.

    A letter weighs 1; a class, which many tokens match, 16; ``.`` and other classes that nearly all
    tokens match, 160. Loops are ``?``, ``*`` and ``+``. Over for alternatives, of which only one is
    matched. It reads the syntax no further: who compiles it finds what is wrong in it.

    Args:
        pattern: the regular expression.
        most: counting ends a little past this weight.
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
    return size + sum(one for one, _ in outer), loops + sum(one for _, one in outer)


def _atom(pattern: str, index: int) -> tuple[int, int]:
    """Weight of what stands here, and where the next begins."""
    letter = pattern[index]
    if letter == "[":
        found = _CLASS.match(pattern, index)
        weight = _WIDE if pattern.startswith("[^", index) else _CLASS_WEIGHT
        return weight, found.end() if found else index + 1
    if letter == "\\":
        named = pattern[index + 1 : index + 2]
        weight = _WIDE if named in tuple("DSWPX") else _CLASS_WEIGHT
        return (weight if named in tuple("DSWPXdswpbh") else 1), index + 2
    return (_WIDE if letter == "." else 1), index + 1


def _number(digits: str, most: int) -> int:
    """A count; one with many digits is more than any limit."""
    if len(digits) > len(str(most)):
        return most + 1
    return int(digits) if digits else 0
