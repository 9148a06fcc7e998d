"""What a rehearsal's child tells its parent besides memory: one JSON file, rewritten."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from turbofit.core.json_types import Document

__all__ = ["Notes", "leave", "peak_rss", "read_notes"]

_NAME = "report.json"


def peak_rss() -> int:
    """Most resident bytes of this process; 0 where the kernel does not say.

    Not ``getrusage``: what it counts outlives ``exec``, so that it may be the parent's.
    """
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = [line.split()[1] for line in text.splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else 0


class Notes:
    """The child's side: values in a file that is whole at every moment.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = time.monotonic()
        self.data: dict[str, Any] = {"seconds": {}, "cases": []}

    def write(self, **values: Any) -> None:
        """Adds values and writes the file anew."""
        self.data.update(values)
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(self.data), encoding="utf-8")
        temporary.replace(self._path)

    def at(self, name: str) -> None:
        """Notes the seconds since the child's start under a name."""
        self.data["seconds"][name] = round(time.monotonic() - self._start, 3)
        self.write()


def read_notes(folder: Path) -> Document:
    """What a child told in its folder's ``report.json``; empty where it told nothing."""
    try:
        data: dict[str, Any] = json.loads((folder / _NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data


def leave(code: int) -> NoReturn:
    """Leaves at once: the engine's threads are not joined."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
