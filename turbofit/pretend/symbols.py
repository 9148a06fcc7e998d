"""Names for the offsets of a timeline's traces, from a library's dynamic symbols."""

from __future__ import annotations

import bisect
import re
from functools import lru_cache
from pathlib import Path

from turbofit.kernels.families import demangle
from turbofit.pretend.elf import dynamic_symbols

#: Beginnings of functions that say how memory is asked for, not what for.
PLUMBING = ("core::", "std::", "Allocator", "{anonymous}", "__", "Buffer", "?")


class Symbols:
    """The functions of a shared library, by offset."""

    def __init__(self, library: Path) -> None:
        found = sorted(
            (s.offset, s.offset + s.size, s.name)
            for s in dynamic_symbols(library)
            if s.function and s.defined
        )
        self._starts = [f[0] for f in found]
        self._ends = [f[1] for f in found]
        self._names = [f[2] for f in found]

    def name(self, offset: int) -> str:
        """The readable name of the function at an offset, or ``?`` where it has none."""
        at = bisect.bisect_right(self._starts, offset - 1) - 1
        if at < 0 or offset - 1 >= self._ends[at]:
            return "?"
        return short_name(demangle(self._names[at]))


@lru_cache(maxsize=8192)
def short_name(name: str) -> str:
    """A C++ name without its arguments, template arguments, return type and outer namespace."""
    name = name.replace("(anonymous namespace)", "{anonymous}")
    for pattern in (r"<[^<>]*>", r"\([^()]*\)(?: const)?(?: noexcept)?"):
        before = ""
        while before != name:
            before, name = name, re.sub(pattern, "", name)
    pieces = name.split(" [")[0].split()
    return pieces[-1].removeprefix("turbomind::") if pieces else name
