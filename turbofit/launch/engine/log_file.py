"""An engine's log on disk: repeated lines become a count, and its size is capped.

TurboMind's hang prints tens of thousands of equal lines a second, so whole chunks are worked on:
one pass of a regular expression takes the times out, and only lines that differ are looked at.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING, Final

from turbofit.core.process.log_queue import CappedLog

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


#: TurboMind's ``[MMDD.HH:MM:SS.uuuuuu]`` and Python's ``YYYY-MM-DD HH:MM:SS,mmm``.
_TIME: Final = re.compile(
    rb"(?m)^(?:(\[TM\]\[[A-Z]+\])\[\d{4}\.\d\d:\d\d:\d\d\.\d{6}\]"
    rb"|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3})"
)
_CAP: Final = 16 << 20
_LONGEST_LINE: Final = 1 << 16
#: Bytes that may wait for the disk: a few chunks.
_ROOM: Final = 4 << 20
_MISSING: Final = "    (lines missing here: {:,}; the disk was full or slow)\n"
#: What stands in the place of equal lines; tools that print a log may strip some of its spaces.
_REPEATED: Final = "    (the line above came {} more times)"
_REPEATED_LINE: Final = re.compile(
    r"\s+" + re.escape(_REPEATED.lstrip()).replace(r"\{\}", r"(\d{1,12})")
)
#: A line without its time, and how often it came in a row.
Run = tuple[str, int]


class LogFile:
    """Takes an engine's output in chunks, keeps it, and tells what was printed.

    After ``cap`` bytes a new file is begun; ``path`` with ``.1`` appended is the one before. Where
    it is not ``required``, what cannot be opened is tried again at each write.

    Raises:
        OSError: it is required, and cannot be opened.
    """

    def __init__(self, path: Path, *, cap: int = _CAP, required: bool = True) -> None:
        #: Takes the lines that are kept.
        self.kept = CappedLog(
            path, cap, lambda lines: _MISSING.format(lines).encode(), _ROOM, required=required
        )
        self._tail = b""
        self._last = b""
        self._repeats = 0

    def feed(self, chunk: bytes) -> list[Run]:
        """Keep a chunk and return its whole lines, equal ones in a row as one with a count."""
        data = self._tail + chunk
        whole, newline, self._tail = data.rpartition(b"\n")
        if not newline:
            if len(self._tail) < _LONGEST_LINE:
                return []
            whole, self._tail = self._tail, b""
        return list(self._keep(whole))

    def close(self) -> list[Run]:
        runs = list(self._keep(self._tail)) if self._tail else []
        self._tail = b""
        self._write(self._repeated())
        self.kept.close()
        return runs

    def _keep(self, whole: bytes) -> Iterator[Run]:
        """Write what is new of these lines.

        A progress bar's carriage returns count as line ends: only its last state is a line.
        """
        times = whole.split(b"\n")
        keys = _TIME.sub(rb"\1", whole).split(b"\n")
        out: list[bytes] = []
        at = 0
        for key, run in groupby(keys):
            count = sum(1 for _ in run)
            if key == self._last and key:
                self._repeats += count
            else:
                out += [*self._repeated(), times[at]]
                self._last, self._repeats = key, count - 1
            at += count
            last = key.rstrip(b"\r").rpartition(b"\r")[2] if b"\r" in key else key
            yield last.decode(errors="replace"), count
        self._write(out)

    def _repeated(self) -> list[bytes]:
        """What stands for the repeats of the last line, which are counted anew."""
        count, self._repeats = self._repeats, 0
        return [_REPEATED.format(count).encode()] if count else []

    def _write(self, lines: list[bytes]) -> None:
        if lines:
            self.kept.put(b"\n".join(lines) + b"\n")


def repeats(line: str) -> int | None:
    """How many more lines, equal to the one before, this line stands for; None where for none."""
    match = _REPEATED_LINE.fullmatch(line)
    return None if match is None else int(match[1])
