"""What many simulated days showed, as a page."""

from __future__ import annotations

import platform
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.simulation.history import Result

__all__ = ["Totals", "write_results"]

_SHOWN = 20


class Totals:
    """Sums over days.

    Args:
        workers: processes that simulated them.
        unit: what a history is called.
    """

    def __init__(self, workers: int, unit: str = "simulated days") -> None:
        self.workers, self.unit = workers, unit
        self.days = self.steps = 0
        #: Of the clock, and of the processor.
        self.seconds = self.processor = 0.0
        self.first = self.last = -1
        self.counts: Counter[str] = Counter()
        self.violations: list[tuple[int, str]] = []

    def add(self, result: Result) -> None:
        """One day more."""
        self.first = result.seed if self.first < 0 else min(self.first, result.seed)
        self.last = max(self.last, result.seed)
        self.days += 1
        self.steps += result.steps
        self.processor += result.processor
        self.counts.update(result.counts)
        self.violations += [(result.seed, text) for text in result.violations]

    @property
    def faults(self) -> int:
        return sum(many for name, many in self.counts.items() if name.startswith("fault "))

    def summary(self) -> str:
        """One paragraph."""
        first: dict[int, str] = {}
        for seed, text in self.violations:
            first.setdefault(seed, text)
        lines = [
            f"{self.days} {self.unit} (seeds {self.first} to {self.last}) with {self.faults} "
            f"faults and {self.counts['requests']} requests: {len(self.violations)} violations in "
            f"{len(first)} of them; {self.seconds:.0f} s with {self.workers} workers, "
            f"{self.days / max(self.seconds, 1e-9):.1f} a second, "
            f"{self.processor / max(self.days, 1):.2f} s of processor time each"
        ]
        lines += [f"seed {seed}: {text[:300]}" for seed, text in sorted(first.items())[:_SHOWN]]
        return "\n".join(lines)


def write_results(path: Path, totals: Totals, options: str) -> None:
    """The page of a run with these options."""
    date = time.strftime("%Y-%m-%d")
    lines = [
        f"# {totals.unit.capitalize()}", "",
        f"{totals.summary()}.", "",
        f"Written by `python -m bench.simulation.run {options}` on {platform.system()}, Python "
        f"{platform.python_version()}, {date}. Everything outside turbofit is simulated; see the "
        "README here.", "",
        "| what | times |", "|---|---|",
    ]  # fmt: skip
    lines += [f"| {name} | {many:,} |" for name, many in sorted(totals.counts.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
