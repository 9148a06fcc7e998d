"""Host memory of whatever this process started: sampled, the peak of the sum."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Final

_EVERY: Final = 0.1
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def _resident() -> dict[int, tuple[int, int]]:
    """Parent and resident bytes of every process."""
    found = {}
    for place in Path("/proc").iterdir():
        if not place.name.isdigit():
            continue
        try:
            fields = (place / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just gone
            continue
        found[int(place.name)] = (int(fields[1]), int(fields[21]) * _PAGE)
    return found


def below(root: int) -> int:
    """Resident bytes of all that ``root`` started, itself left out."""
    every, total = _resident(), 0
    inside = {root}
    grown = True
    while grown:
        more = {pid for pid, (parent, _) in every.items() if parent in inside} - inside
        inside |= more
        grown = bool(more)
    for pid in inside - {root}:
        total += every[pid][1]
    return total


class Peak:
    """``with Peak() as peak``: ``peak.bytes`` is the most that was seen."""

    def __init__(self) -> None:
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_EVERY):
            self.bytes = max(self.bytes, below(os.getpid()))
