"""Reduces one process's timeline to what it held: by device and phase, its peaks, its refusals.

Sizes are bytes, devices the machine's own indices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from turbofit.pretend.symbols import PLUMBING, Symbols
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
    """An allocation that did not fit: what was asked, what was free, what the device lacked.

    ``simulated`` is its number where the scenario let it fail (``fail_at``): nothing lacked then.
    """

    device: int
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
    return _Reader().read(events)


class _Reader:
    def __init__(self) -> None:
        self._usage = Usage()
        self._phase = BEFORE
        self._library = ""
        self._held: dict[int, int] = {}
        self._where: dict[str, int] = {}
        # What waits for a site: peaks and refusals whose call has not come back yet.
        self._waiting: list[Peak | RefusedAllocation] = []

    def read(self, events: Iterable[Event]) -> Usage:
        handlers = {
            "I": self._begins,
            "N": self._command,
            "L": self._names,
            "K": self._context,
            "P": self._mark,
            "S": self._site,
            "A": self._given,
            "F": self._freed,
            "R": self._resized,
            "O": self._refused,
            "E": self._failed,
        }
        for event in events:
            if event.tag in handlers:
                handlers[event.tag](event)
        return self._usage

    def _begins(self, event: Event) -> None:
        self._usage.pid, self._usage.parent = event.number(0), event.number(1)

    def _command(self, event: Event) -> None:
        self._usage.command = event.fields[0]

    def _names(self, event: Event) -> None:
        self._library = event.fields[0]

    def _context(self, event: Event) -> None:
        self._usage.contexts[event.number(0)] = event.number(1)

    def _mark(self, event: Event) -> None:
        self._phase = event.fields[0]
        for device, size in self._held.items():
            self._hold(device, size)

    def _site(self, event: Event) -> None:
        for one in self._waiting:
            one.site = event.fields[0]
        self._waiting.clear()

    def _hold(self, device: int, size: int, event: Event | None = None) -> None:
        self._held[device] = size
        phases = self._usage.phases.setdefault(device, {})
        phases[self._phase] = max(phases.get(self._phase, 0), size)
        self._usage.ends.setdefault(device, {})[self._phase] = size
        peak = self._usage.peaks.setdefault(device, Peak())
        if size > peak.size and event is not None:
            peak.size, peak.phase, peak.site = size, self._phase, self._native(event)
            if peak not in self._waiting:
                self._waiting.append(peak)

    def _given(self, event: Event) -> None:
        device, kind = event.number(0), event.number(1)
        if kind != PINNED:
            self._where[event.fields[5]] = device
            self._hold(device, event.number(4), event)

    def _freed(self, event: Event) -> None:
        device = self._where.pop(event.fields[0], None)
        if device is not None:
            self._hold(device, event.number(1))

    def _resized(self, event: Event) -> None:
        self._hold(event.number(0), event.number(3))

    def _refused(self, event: Event) -> None:
        self._refuse(event, event.number(5) - event.number(4))

    def _failed(self, event: Event) -> None:
        self._refuse(event, 0, simulated=event.number(5))

    def _refuse(self, event: Event, short: int, *, simulated: int | None = None) -> None:
        device, kind, _, requested, left = (event.number(i) for i in range(5))
        site = self._native(event)
        refusal = RefusedAllocation(
            device, KINDS[kind], requested, left, short, self._phase, site, simulated
        )
        self._usage.refused.append(refusal)
        self._waiting.append(refusal)

    def _native(self, event: Event) -> str | None:
        """The engine's own functions, innermost first, without those that only ask."""
        if not event.trace or not self._library:
            return None
        names = list(_named(self._library, event.trace))
        useful = [n for n in names if not n.startswith(PLUMBING)] or names
        return " < ".join(useful[:_MOST_NAMES]) or None


def _named(library: str, trace: tuple[int, ...]) -> Iterator[str]:
    symbols = _symbols(library)
    return (symbols.name(offset) for offset in trace) if symbols else iter(())


@lru_cache(maxsize=4)
def _symbols(library: str) -> Symbols | None:
    try:
        return Symbols(Path(library))
    except (OSError, ValueError):
        return None
