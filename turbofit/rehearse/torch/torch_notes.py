"""What a torch engine's child tells its parent besides memory."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

from turbofit.rehearse.torch.phase_recorder import Phases
from turbofit.rehearse.turbomind.notes import Notes

__all__ = ["NotesReport"]


class NotesReport(Notes):
    """The notes of a torch engine's child, and the phases it enters."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "report.json")
        self._phases = Phases(folder)
        self.write(pid=os.getpid())

    @property
    def phase(self) -> str:
        """The open phase."""
        return self._phases.name

    def enter(self, phase: str) -> None:
        """Begins a phase, everywhere."""
        self.at(phase)
        self._phases.enter(phase)
        self.write(phase=phase)

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
