"""What a rehearsal's child tells its parent besides memory: one JSON file, rewritten."""

from __future__ import annotations

import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

from turbofit.rehearse.torch_clerk import Phases

__all__ = ["Report"]


class Report:
    """What the child tells its parent: one JSON file, rewritten; and the phases it enters."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "report.json"
        self._start = time.monotonic()
        self._phases = Phases(folder)
        self.data: dict[str, Any] = {"pid": os.getpid(), "seconds": {}, "cases": []}
        self.write()

    @property
    def phase(self) -> str:
        """The open phase."""
        return self._phases.name

    def enter(self, phase: str) -> None:
        """Begins a phase, everywhere."""
        self.data["seconds"][phase] = round(time.monotonic() - self._start, 3)
        self._phases.enter(phase)
        self.write(phase=phase)

    def write(self, **values: Any) -> None:
        """Adds values and writes the file anew."""
        self.data.update(values)
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(self.data), encoding="utf-8")
        temporary.replace(self._path)

    def error(self, error: BaseException) -> None:
        """Notes what ended it, in which phase, and which lines led there."""
        frames = traceback.extract_tb(error.__traceback__)
        self.write(
            error={
                "type": type(error).__name__,
                "message": str(error),
                "phase": self.phase,
                "frames": [f"{f.filename}:{f.lineno} {f.name}" for f in frames],
            }
        )
