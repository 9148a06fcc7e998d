"""Reads the timeline that the account writes (the format is in csrc/timeline.c)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KINDS = ("cudaMalloc", "pool", "VMM", "pinned host", "CUDA context")
MALLOC, POOL, VMM, PINNED, CONTEXT = range(5)
_LONGEST_LINE = 1024  # bytes; csrc/timeline.c writes no longer one


@dataclass(frozen=True)
class Event:
    """One line of the timeline.

    Attributes:
        tag: I whose it is, N its command, L the library of its traces, P mark, S where the newest
            peak came from, K context made, C pool made, A given, F given back, R pool resized, G
            free memory asked, O out of memory, E failed because the scenario says so, X peer access
            refused.
        fields: the rest of the line, by position.
        trace: offsets into the engine's library, innermost first.
    """

    tag: str
    fields: tuple[str, ...]
    trace: tuple[int, ...]

    def number(self, index: int) -> int:
        """The word at ``index`` as a number."""
        return int(self.fields[index])


class TimelineReader:
    """Reads a timeline while it is written.

    ``read_bytes`` are those of the events so far.

    Args:
        path: the file, which may grow between two readings.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.read_bytes = path, 0

    def new_events(self) -> Iterator[Event]:
        """Yields the events since the last reading in order; an unfinished last line is left out.

        Raises:
            OSError: the file cannot be read.
        """
        with self._path.open("rb") as file:
            file.seek(self.read_bytes)
            rest = b""
            while True:
                chunk = file.read(1 << 20)
                end = chunk.find(b"\0")
                text = rest + (chunk if end < 0 else chunk[:end])
                lines = text.split(b"\n")
                rest = lines.pop()
                for line in lines:
                    self.read_bytes += len(line) + 1
                    if line:
                        yield _event(line.decode("utf-8", "replace"))
                if not chunk or end >= 0:
                    return


def read_timeline(path: Path) -> Iterator[Event]:
    """Yields all events in order; an unfinished last line is left out."""
    return TimelineReader(path).new_events()


def timeline_is_full(path: Path) -> bool:
    """Whether events are missing because the file's length (``timeline_limit``) was reached."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LONGEST_LINE))
        return bool(file.read(_LONGEST_LINE).strip(b"\0"))


def _event(line: str) -> Event:
    tag, _, rest = line.partition(" ")
    if tag in ("P", "S", "N", "L"):
        return Event(tag, (rest,), ())
    head, _, frames = rest.partition(" @")
    return Event(tag, tuple(head.split()), tuple(int(f, 16) for f in frames.split(",") if f))
