"""Stores documents as files, and compares two sides byte for byte."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from bench.golden.cases import Case

#: Characters of a line of a diff that are shown.
_WIDTH = 200
#: Characters of a command line in its file's name.
_LONGEST = 100


class Difference(NamedTuple):
    """A case whose documents differ; ``diff`` is empty if one side has no document."""

    name: str
    diff: tuple[str, ...]


def write_folder(folder: Path, cases: Iterable[Case], documents: Mapping[str, str]) -> None:
    """Write each document as a file in its group's folder; nothing is removed.

    Raises:
        OSError: it cannot be written.
    """
    for case in cases:
        path = folder / case.group / _file_name(case.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(documents[case.name].encode())


def read_folder(folder: Path, only: Iterable[str] = ()) -> dict[str, str]:
    """Read by case the documents that `write_folder` wrote, of some groups or of all.

    Raises:
        OSError: it cannot be read.
    """
    wanted = set(only)
    found = {}
    for path in sorted(folder.glob("*/*.txt")):
        if not wanted or path.parent.name in wanted:
            text = path.read_bytes().decode()
            found[text.partition("\n")[0].removeprefix("$ ")] = text
    return found


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Difference]:
    """Yield the documents that differ, with short unified diffs."""
    for name in dict.fromkeys((*now, *before)):
        old, new = before.get(name), now.get(name)
        if old is None or new is None:
            yield Difference(name, ())
        elif old != new:
            lines = difflib.unified_diff(
                old.split("\n"), new.split("\n"), "before", "now", n=1, lineterm=""
            )
            yield Difference(name, tuple(lines))


def shown(found: Iterable[Difference], *, diffs: int, lines: int) -> Iterator[str]:
    """Yield differences as lines: each change once, with the names of all cases that have it."""
    alike: dict[tuple[str, ...], list[Difference]] = {}
    for one in found:
        change = tuple(line for line in one.diff[2:] if line[0] in "+-")
        alike.setdefault(change, []).append(one)
    for number, (change, same) in enumerate(alike.items()):
        if number == diffs:
            yield f"… and {len(alike) - diffs} other changes"
            return
        yield ""
        yield f"{same[0].name}"
        if len(same) > 1:
            names = "; ".join(one.name for one in same[1:4])
            more = f"; and {len(same) - 4} more" if len(same) > 4 else ""
            yield f"(the same in {len(same) - 1} others: {names}{more})"
        diff = (line[:_WIDTH] for line in same[0].diff[:lines])
        yield from diff if change else ("only one side has it",)
        if len(same[0].diff) > lines:
            yield f"… {len(same[0].diff) - lines} more lines"


def _file_name(name: str) -> str:
    words = re.sub(r"[^\w.=+@-]+", "_", name).strip("_")
    return f"{words[:_LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.txt"
