"""Reduces one process's timeline to what it held: by device and phase, its peaks, its refusals.

Sizes are bytes, devices the machine's own indices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from turbofit.pretend.elf import PLUMBING, Symbols
from turbofit.pretend.timeline import KINDS, PINNED, Event

#: The phase before the first mark.
BEFORE = "start"
_MOST_NAMES = 3


@dataclass(eq=False)
class Peak:
    """The most that was held on a device: in which phase, and from which call, if that is known."""

    size: int = 0
    phase: str = BEFORE
    site: str | None = None


@dataclass(eq=False)
class RefusedAllocation:
    """An allocation that did not fit: what was asked, what was free, what the GPU lacked.

    ``simulated`` is its number where the scenario let it fail (``fail_at``): nothing lacked then.
    """

    gpu: int
    kind: str
    requested: int
    left: int
    short: int
    phase: str
    site: str | None
    simulated: int | None = None


@dataclass
class Usage:
    """One process: its parent, its command, what it held and what it was refused.

    By device: ``contexts``, ``peaks``, and by phase, in order, the most that was held (``phases``)
    and what was held last (``ends``); contexts are left out of these.

    ``complete`` is False where the timeline was full before the process ended: phases, calls and
    refusals then end early.
    """

    pid: int = 0
    parent: int = 0
    command: str = ""
    peaks: dict[int, Peak] = field(default_factory=dict)
    phases: dict[int, dict[str, int]] = field(default_factory=dict)
    refused: list[RefusedAllocation] = field(default_factory=list)
    complete: bool = True
    ends: dict[int, dict[str, int]] = field(default_factory=dict)
    contexts: dict[int, int] = field(default_factory=dict)


def read_usage(events: Iterable[Event]) -> Usage:
    """Read a timeline; one that ends in the middle is valid too."""
    reader = _Reader()
    for event in events:
        reader.take(event)
    return reader.usage


class _Reader:
    def __init__(self) -> None:
        self.usage = Usage()
        self._phase = BEFORE
        self._library = ""
        self._held: dict[int, int] = {}
        self._where: dict[str, int] = {}
        # What waits for a site: peaks and refusals whose call has not come back yet.
        self._waiting: list[Peak | RefusedAllocation] = []

    def take(self, event: Event) -> None:
        """The next event."""
        usage, number = self.usage, event.number
        match event.tag:
            case "I":
                usage.pid, usage.parent = number(0), number(1)
            case "N":
                usage.command = event.fields[0]
            case "L":
                self._library = event.fields[0]
            case "K":
                usage.contexts[number(0)] = number(1)
            case "P":
                self._phase = event.fields[0]
                for device, size in self._held.items():
                    self._hold(device, size)
            case "S":
                for waiting in self._waiting:
                    waiting.site = event.fields[0]
                self._waiting.clear()
            case "A" if number(1) != PINNED:
                self._where[event.fields[5]] = number(0)
                self._hold(number(0), number(4), event)
            case "F" if event.fields[0] in self._where:
                self._hold(self._where.pop(event.fields[0]), number(1))
            case "R":
                self._hold(number(0), number(3))
            case "O":
                self._refuse(event, number(5) - number(4))
            case "E":
                self._refuse(event, 0, simulated=number(5))

    def _hold(self, device: int, size: int, event: Event | None = None) -> None:
        self._held[device] = size
        phases = self.usage.phases.setdefault(device, {})
        phases[self._phase] = max(phases.get(self._phase, 0), size)
        self.usage.ends.setdefault(device, {})[self._phase] = size
        peak = self.usage.peaks.setdefault(device, Peak())
        if size > peak.size and event is not None:
            peak.size, peak.phase, peak.site = size, self._phase, self._native(event)
            if peak not in self._waiting:
                self._waiting.append(peak)

    def _refuse(self, event: Event, short: int, *, simulated: int | None = None) -> None:
        gpu, kind, _, size, left = (event.number(i) for i in range(5))
        site = self._native(event)
        refusal = RefusedAllocation(
            gpu, KINDS[kind], size, left, short, self._phase, site, simulated
        )
        self.usage.refused.append(refusal)
        self._waiting.append(refusal)

    def _native(self, event: Event) -> str | None:
        """The engine's own functions, innermost first, without those that only ask."""
        symbols = _symbols(self._library) if event.trace and self._library else None
        if symbols is None:
            return None
        names = [symbols.name(offset) for offset in event.trace]
        useful = [n for n in names if not n.startswith(PLUMBING)] or names
        return " < ".join(useful[:_MOST_NAMES])


@lru_cache(maxsize=4)
def _symbols(library: str) -> Symbols | None:
    try:
        return Symbols(Path(library))
    except (OSError, ValueError):
        return None
