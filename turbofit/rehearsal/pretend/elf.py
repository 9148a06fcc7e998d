"""Reads the dynamic symbols of 64-bit little-endian ELF libraries.

Each function raises a ValueError for any other file.
"""

from __future__ import annotations

import bisect
import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from turbofit.machine.kernels.device_code import mapped, sections
from turbofit.machine.kernels.families import demangle

#: Beginnings of names of functions that only allocate memory; such a name says no purpose.
PLUMBING = ("core::", "std::", "Allocator", "{anonymous}", "__", "Buffer", "?")

_SYMBOL = struct.Struct("<IBBHQQ")  # Elf64_Sym
_ENTRY = struct.Struct("<qQ")  # Elf64_Dyn
_VERSIONS = struct.Struct("<HHIII")  # Elf64_Verneed
_VERSION = struct.Struct("<IHHII")  # Elf64_Vernaux
_DYNAMIC, _DYNSYM, _VERNEED = 6, 11, 0x6FFFFFFE
_NEEDED = 1
_FUNCTION = 2


@dataclass(frozen=True)
class Symbol:
    """A dynamic symbol of a library; ``defined`` is False if the library imports the symbol."""

    name: str
    offset: int
    size: int
    function: bool
    defined: bool


def needed(library: Path) -> tuple[str, ...]:
    """Return the sonames of the libraries with which a library is linked."""
    with _complete(library), mapped(library) as data:
        for strings, raw in _tables(data, _DYNAMIC):
            entries = _ENTRY.iter_unpack(raw)
            return tuple(_text(strings, at) for tag, at in entries if tag == _NEEDED)
    return ()


def needed_versions(library: Path) -> dict[str, frozenset[str]]:
    """Return the symbol versions that a library needs of other libraries, by their sonames."""
    with _complete(library), mapped(library) as data:
        return {
            name: versions
            for strings, raw in _tables(data, _VERNEED)
            for name, versions in _wanted(strings, raw)
        }


def _wanted(strings: bytes, raw: bytes) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield each soname in a table of needed versions, with its versions.

    ``raw`` is the table, ``strings`` has its names. A list ends at an entry whose next offset is 0.
    """
    offset, following = 0, -1
    while following:
        _, count, file, first, following = _VERSIONS.unpack_from(raw, offset)
        place, versions = offset + first, set()
        for _ in range(count):
            _, _, _, name, after = _VERSION.unpack_from(raw, place)
            versions.add(_text(strings, name))
            place += after
        yield _text(strings, file), frozenset(versions)
        offset += following


def _text(strings: bytes, at: int) -> str:
    return strings[at : strings.index(b"\0", at)].decode("utf-8", "replace")


def dynamic_symbols(library: Path) -> Iterator[Symbol]:
    """Yield all dynamic symbols; a library of hundreds of MB takes well under 0.1 s."""
    with _complete(library), mapped(library) as data:
        for strings, raw in _tables(data, _DYNSYM):
            for name, info, _, index, value, length in _SYMBOL.iter_unpack(raw):
                if not name:
                    continue
                yield Symbol(
                    name=_text(strings, name),
                    offset=value,
                    size=length,
                    function=info & 15 == _FUNCTION,
                    defined=index != 0,
                )


def _tables(data: mmap.mmap, kind: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the strings and the bytes of each section of a kind; the strings have the names."""
    whole = list(sections(data))
    for section in whole:
        if section.kind == kind:
            names = whole[section.link]
            strings = data[names.offset : names.offset + names.size]
            yield strings, data[section.offset : section.offset + section.size]


@contextmanager
def _complete(library: Path) -> Iterator[None]:
    """Raise a ValueError if the library cannot be read, for instance because it is truncated."""
    try:
        yield
    except (ValueError, struct.error, IndexError, OverflowError) as exc:
        raise ValueError(f"{library}: {exc}") from None


class Symbols:
    """Finds the functions of a shared library by offset."""

    def __init__(self, library: Path) -> None:
        functions = sorted(
            (s.offset, s.offset + s.size, s.name)
            for s in dynamic_symbols(library)
            if s.function and s.defined
        )
        self._starts = [f[0] for f in functions]
        self._ends = [f[1] for f in functions]
        self._names = [f[2] for f in functions]

    def name(self, offset: int) -> str:
        """Return the short name of the function at an offset; ``?`` if there is no function."""
        # A stack trace has the place behind each call; the byte before this place is in the caller.
        at = bisect.bisect_right(self._starts, offset - 1) - 1
        if at < 0 or offset - 1 >= self._ends[at]:
            return "?"
        return short_name(demangle(self._names[at]))


@lru_cache(maxsize=8192)
def short_name(name: str) -> str:
    """Remove arguments, template arguments, return type and outer namespace from a C++ name."""
    name = name.replace("(anonymous namespace)", "{anonymous}")
    for pattern in (r"<[^<>]*>", r"\([^()]*\)(?: const)?(?: noexcept)?"):
        before = ""
        while before != name:
            before, name = name, re.sub(pattern, "", name)
    pieces = name.split(" [")[0].split()
    return pieces[-1].removeprefix("turbomind::") if pieces else name
