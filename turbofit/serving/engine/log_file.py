"""An engine's log: lines without times, with counts of equal lines, in a file of limited size.

A hanging TurboMind prints tens of thousands of equal lines a second. So whole chunks are processed:
one regular expression removes the times, and equal lines become one line with a count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Final

from turbofit.serving.process.log_queue import FileLog

#: TurboMind's ``[MMDD.HH:MM:SS.uuuuuu]`` and Python's ``YYYY-MM-DD HH:MM:SS,mmm``.
_TIME: Final = re.compile(
    rb"(?m)^(?:(\[TM\]\[[A-Z]+\])\[\d{4}\.\d\d:\d\d:\d\d\.\d{6}\]"
    rb"|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3})"
)
_CAP: Final = 16 << 20
_LONGEST_LINE: Final = 1 << 16
#: The most chunks that may wait for the disk; a chunk has up to 64 KiB, as a pipe holds.
_ROOM: Final = 64
_LOST: Final = "\n    (lines are missing here: the disk was full or slow)\n"
#: The line that replaces equal lines.
_REPEATED: Final = "    (the line above came {} more times)"
#: A line without its time, and how often the line was printed in a row.
Run = tuple[str, int]


class LogFile:
    """Takes an engine's output in chunks, writes the output to a file, and returns the lines.

    After ``cap`` bytes a new file begins; the previous file is kept as ``path`` with ``.1``
    appended. If a file that is not ``required`` cannot be opened, each write tries again.

    Raises:
        OSError: the file is required, and cannot be opened.
    """

    def __init__(self, path: Path, *, cap: int = _CAP, required: bool = True) -> None:
        #: Writes the lines that are kept.
        self.kept = FileLog(path, cap, _LOST, _ROOM, required=required)
        #: The beginning of a line whose end has not come.
        self._tail = b""
        #: The last written line without its time, and how often it came again since.
        self._last = b""
        self._repeats = 0

    def feed(self, chunk: bytes) -> list[Run]:
        """Write a chunk and return its complete lines.

        Equal lines in a row become one `Run` with a count.
        """
        data = self._tail + chunk
        whole, newline, self._tail = data.rpartition(b"\n")
        if not newline:
            if len(self._tail) < _LONGEST_LINE:
                return []
            whole, self._tail = self._tail, b""
        return list(self._keep(whole))

    def close(self) -> list[Run]:
        """Write the last lines, close the file, and return the last lines."""
        runs = list(self._keep(self._tail)) if self._tail else []
        self._tail = b""
        self._write(self._repeated())
        self.kept.close()
        return runs

    def _keep(self, whole: bytes) -> Iterator[Run]:
        """Write each line that differs from the previous line; yield all lines with counts.

        A progress bar redraws its line after carriage returns; only the last state is yielded.
        """
        lines = whole.split(b"\n")
        # Lines are equal if they differ only in their times.
        keys = _TIME.sub(rb"\1", whole).split(b"\n")
        written: list[bytes] = []
        place = 0
        for key, run in groupby(keys):
            count = sum(1 for _ in run)
            if key == self._last and key:
                self._repeats += count
            else:
                written += [*self._repeated(), lines[place]]
                self._last, self._repeats = key, count - 1
            place += count
            state = key.rstrip(b"\r").rpartition(b"\r")[2] if b"\r" in key else key
            yield state.decode(errors="replace"), count
        self._write(written)

    def _repeated(self) -> list[bytes]:
        """Return a line with the number of repetitions of the last line, and reset the number.

        Empty without repetitions.
        """
        count, self._repeats = self._repeats, 0
        return [_REPEATED.format(count).encode()] if count else []

    def _write(self, lines: list[bytes]) -> None:
        if lines:
            text = b"\n".join(lines) + b"\n"
            self.kept.put(text.decode(errors="surrogateescape"))
