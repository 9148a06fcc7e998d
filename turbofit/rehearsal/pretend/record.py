"""Reads a pretend machine's folder: one record of its processes, and what they hold meanwhile."""

from __future__ import annotations

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
    read_shared,
    timeline_events,
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
    sites = None if library is None else CallSites(Symbols(library).name)
    memories = []
    # Process PID writes ``PID.timeline``, and ``PID-1.timeline`` after an exec.
    files = (folder / "timelines").iterdir()
    for path in sorted(files, key=lambda file: [int(part) for part in file.stem.split("-")]):
        memory = _empty(scenario, sites)
        memory.complete = not timeline_is_full(path)
        with path.open("r+b") as file:
            memories.append(memory.read(timeline_events(file)))
            file.truncate()  # cut off the zero bytes after the last event
    return MachineRecord(scenario, processes_in(folder), tuple(memories))


def processes_in(folder: Path) -> SharedRecord:
    """Read the processes of a machine that may still run; empty if there is no file yet.

    Raises:
        OSError, ValueError: the file cannot be read, or another version of turbofit wrote it.
    """
    return read_shared(folder / "shared")


def _empty(scenario: Scenario, sites: CallSites | None = None) -> ProcessMemory:
    """Return the memory of a process before its first event."""
    return ProcessMemory(len(scenario.gpus), sites, scenario.pool_step)
