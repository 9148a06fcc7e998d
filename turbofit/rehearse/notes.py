"""What a rehearsal's child tells its parent besides memory: one JSON file, rewritten."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turbofit.core.json_types import Document

__all__ = ["NOT_FINISHED", "Notes", "case_notes", "read_notes"]

_NAME = "report.json"
#: How a request ended that did not end in time.
NOT_FINISHED = "not finished"


class Notes:
    """The child's side: values in a file that is whole at every moment.

    Args:
        folder: the rehearsal's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._start = time.monotonic()
        #: What begins a phase in the processes of the engine.
        self.begin: Callable[[str], None] = lambda _: None
        self.phase = "import"
        #: What must not be freed before the process ends: its memory belongs to the last phase.
        self.alive: list[object] = []
        self.data: dict[str, Any] = {"pid": os.getpid(), "seconds": {}, "cases": []}
        self.write()

    def write(self, **values: Any) -> None:
        """Adds values and writes the file anew."""
        self.data.update(values)
        temporary = self.folder / f"{_NAME}.new"
        temporary.write_text(json.dumps(self.data), encoding="utf-8")
        temporary.replace(self.folder / _NAME)

    def enter(self, phase: str) -> None:
        """Begins a phase, and notes the seconds since the child's start."""
        self.phase = phase
        self.data["seconds"][phase] = round(time.monotonic() - self._start, 3)
        self.begin(phase)
        self.write(phase=phase)

    def error(self, error: BaseException) -> None:
        """Notes what ended it, in which phase, and which lines led there, outermost first."""
        frames = traceback.extract_tb(error.__traceback__)
        self.write(
            error={
                "type": type(error).__name__,
                "message": str(error),
                "phase": self.phase,
                "frames": [f"{f.filename}:{f.lineno} {f.name}" for f in frames],
            }
        )

    def finish(self) -> None:
        """Notes that all cases were driven, and the most resident bytes of this process.

        Not ``getrusage``: what it counts outlives ``exec``, so that it may be the parent's.
        """
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = next((line for line in text.splitlines() if line.startswith("VmHWM:")), "x 0")
        self.write(done=True, peak_rss=int(peak.split()[1]) * 1024)


def case_notes(
    name: str, tokens: list[int], seconds: float, statuses: list[str], words: str = ""
) -> Document:
    """What is told of a case: prompt tokens and ends of its requests, an error's words."""
    return {
        "name": name,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "statuses": {status: statuses.count(status) for status in sorted(set(statuses))},
        "words": words,
    }


def read_notes(folder: Path) -> Document:
    """What a child told in its folder's ``report.json``; empty where it told nothing."""
    try:
        data: dict[str, Any] = json.loads((folder / _NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data
