"""Reads a pretend machine's folder: one record of its processes, or of one that still runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from turbofit.core.struct import Document
from turbofit.core.units import grouped
from turbofit.rehearsal.pretend.elf import Symbols
from turbofit.rehearsal.pretend.libraries import PretendError
from turbofit.rehearsal.pretend.process_memory import CallSites, ProcessMemory
from turbofit.rehearsal.pretend.scenario import Scenario
from turbofit.rehearsal.pretend.usage import (
    Process,
    SharedRecord,
    TimelineReader,
    read_shared,
    timeline_is_full,
)


@dataclass(frozen=True)
class MachineRecord:
    """What the processes of a pretend machine held; sizes are in bytes.

    ``memories`` has an item for each timeline. A process that called exec has several timelines.
    """

    scenario: Scenario
    shared: SharedRecord
    memories: tuple[ProcessMemory, ...]

    def memory_of(self, pid: int | None) -> ProcessMemory:
        """Return the memory of a process; empty for an unknown process.

        Raises:
            PretendError: the timeline is incomplete.
        """
        own = [memory for memory in self.memories if memory.pid == pid]
        if not all(memory.complete for memory in own):
            raise PretendError(
                "the timeline is incomplete: the disk is full, or it reached"
                f" {self.scenario.timeline_limit:,} bytes",
                hint="make room on the disk, or rehearse fewer requests at once",
            )
        return own[0] if own else _empty(self.scenario)

    def pairs(self) -> list[tuple[Process, ProcessMemory]]:
        """Pair each process with its memory; processes with equal pids in their order."""
        memories = grouped((memory.pid, memory) for memory in self.memories)
        left = {pid: iter(ones) for pid, ones in memories.items()}
        return [
            (process, next(left.get(process.pid, iter(())), _empty(self.scenario)))
            for process in self.shared.processes
        ]

    def card_at_peak(self, index: int) -> Document:
        """Return the facts of a card, with the most bytes that all processes held at one time."""
        gpu, peak = self.scenario.gpus[index], self.shared.peak[index]
        return {
            "name": gpu.name,
            "total": gpu.total,
            "used_by_others": gpu.used,
            "peak": peak,
            "left_at_peak": max(0, gpu.total - gpu.used - peak),
        }

    def newest_refusal(self) -> Document | None:
        """Return the newest refused allocation of any process; None if nothing was refused."""
        refusing = [pair for pair in self.pairs() if pair[0].refused_at and pair[1].deaths]
        if not refusing:
            return None
        process, memory = max(refusing, key=lambda pair: pair[0].refused_at)
        death = memory.deaths[-1]
        return {
            "count": sum(len(memory.deaths) for _, memory in refusing),
            "pid": process.pid,
            "command": memory.command,
            "kind": death["memory_kind"],
            "short": death["missing"] or 0,
            "site": death["where"],
            **{name: death[name] for name in ("gpu", "asked", "left", "phase", "simulated")},
        }


def read(folder: Path, scenario: Scenario, library: Path | None = None) -> MachineRecord:
    """Read the folder of a machine whose processes have ended.

    ``library`` is the engine's library whose calls the timelines name; None for other programs.
    """
    sites, memories = _sites(library), []
    # Process PID writes ``PID.timeline``, and ``PID-1.timeline`` after an exec.
    files = (folder / "timelines").iterdir()
    for path in sorted(files, key=lambda file: [int(part) for part in file.stem.split("-")]):
        reader, memory = TimelineReader(path), _empty(scenario, sites)
        memories.append(memory.read(reader.new_events()))
        memory.complete = not timeline_is_full(path)
        os.truncate(path, reader.read_bytes)  # cut off the zero bytes after the last event
    return MachineRecord(scenario, processes_in(folder), tuple(memories))


def processes_in(folder: Path) -> SharedRecord:
    """Read the processes of a machine that may still run; empty if there is no file yet.

    Raises:
        OSError, ValueError: the file cannot be read, or another version of turbofit wrote it.
    """
    return read_shared(folder / "shared")


class TimelineMemory:
    """Reads the memory of a process that runs, each time from the end of the last reading.

    ``library`` is the engine's library whose calls the timeline names.
    """

    def __init__(self, path: Path, scenario: Scenario, library: Path) -> None:
        self._path, self._scenario, self._sites = path, scenario, _sites(library)
        self._begin()

    def _begin(self) -> None:
        self._memory = _empty(self._scenario, self._sites)
        self._events = TimelineReader(self._path)

    def read(self) -> ProcessMemory | None:
        """Return the memory so far; None if the timeline cannot be read."""
        try:
            return self._memory.read(self._events.new_events())
        except (OSError, ValueError, LookupError):
            self._begin()  # an event may be incomplete: the next reading begins anew
            return None


def _sites(library: Path | None) -> CallSites | None:
    return None if library is None else CallSites(Symbols(library).name)


def _empty(scenario: Scenario, sites: CallSites | None = None) -> ProcessMemory:
    """Return the memory of a process before its first event."""
    return ProcessMemory(len(scenario.gpus), sites, scenario.pool_step)
