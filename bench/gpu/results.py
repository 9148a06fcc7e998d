"""Reads what was measured on real cards: stored documents of `report --share`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from turbofit.core.machine import Gpu
from turbofit.core.plan import Plan
from turbofit.core.struct import decode
from turbofit.machine.presets import load_preset, match_preset, preset_names
from turbofit.report.share import SharedRun

#: Documents of `turbofit report --share`, a file each.
OBSERVATIONS = Path(__file__).parent / "observations"
#: Phases of a start without a calibration, by the figures that its record compares.
_PHASES = {
    "free when the cache was sized": "context and weights",
    "in use after the check": "after the check",
}


def read(file: Path) -> SharedRun:
    """Read a document of `turbofit report --share`.

    Raises:
        UsageError: the file is no document of `turbofit report --share`.
    """
    return decode(file.read_bytes(), SharedRun, what=str(file))


@dataclass(frozen=True)
class Trial:
    """One run on a real card."""

    name: str
    document: SharedRun

    @property
    def plan(self) -> Plan:
        return self.document.plan

    @property
    def gpu(self) -> Gpu:
        """The first card that the run used."""
        return self.plan.machine.gpu(self.plan.groups[0][0])

    @cached_property
    def preset(self) -> str | None:
        """The name of the card's preset; None without a preset."""
        found = match_preset(self.gpu)
        return next((key for key in preset_names() if load_preset(key) == found), None)

    @cached_property
    def phases(self) -> list[dict[str, Any]]:
        """Forecast and measured bytes in use, in each phase that was read."""
        return self.document.phases or list(self._starts())

    def _starts(self) -> Iterator[dict[str, Any]]:
        """Yield phases from the last start of a run without a calibration, on one card."""
        attempts = self.document.run.attempts
        for engine in attempts[-1].engines if attempts and len(self.plan.ledgers) == 1 else ():
            for row in engine.beside:
                if row.what in _PHASES and row.actual is not None:
                    free = row.what.startswith("free")
                    over = row.actual - row.forecast if free else row.forecast - row.actual
                    yield {
                        "phase": _PHASES[row.what], "gpu": self.plan.ledgers[0].index,
                        "forecast": row.forecast, "measured": row.actual, "over": over,
                    }  # fmt: skip


def trials() -> list[Trial]:
    """Return all stored runs."""
    return [Trial(file.stem, read(file)) for file in sorted(OBSERVATIONS.glob("*.json"))]
