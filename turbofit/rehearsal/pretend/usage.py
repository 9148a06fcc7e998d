"""Reads the files of a pretend machine's account: timelines, and the shared file.

Sizes are in bytes, times in nanoseconds of CLOCK_MONOTONIC; devices are the machine's own indices.
csrc/timeline.c and csrc/shared.h define the formats. The reader does not lock the shared file: two
numbers may be from different moments.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from turbofit.core.process.processes import start_time

#: The name of the phase before the first mark.
BEFORE = "start"
KINDS = ("cudaMalloc", "pool", "VMM", "pinned host", "CUDA context")
MALLOC, POOL, VMM, PINNED, CONTEXT = range(5)
_LONGEST_LINE = 1024  # bytes of a line in csrc/timeline.c at most
_MAGIC = 0x3230454D46425254
_ROWS = 17  # 16 devices, and page-locked host memory
_PINNED = _ROWS - 1
_HEAD = struct.Struct(f"<QII{_ROWS}Q{_ROWS}Q{_ROWS}Q64x2Q")
_SLOT = struct.Struct(f"<IiQQQ{5 * _ROWS}Q")
_LIVE = 1


@dataclass(frozen=True)
class Event:
    """One line of a timeline.

    Attributes:
        tag: the kind of event: I process and parent, N command, P mark of a phase, S the line of
            Python of the newest refused allocation, K context made, C pool made, A memory given, F
            memory given back, R pool resized, G free memory asked, O out of memory, E failed
            because the scenario says so, X peer access refused.
        fields: the rest of the line, by position.
        trace: offsets into the engine's library, innermost first.
    """

    tag: str
    fields: tuple[str, ...]
    trace: tuple[int, ...]

    def number(self, index: int) -> int:
        return int(self.fields[index])


def timeline_events(file: BinaryIO) -> Iterator[Event]:
    """Yield the events of an open timeline; the file's position is then behind the last event.

    Zero bytes, or a line that is not finished, end the timeline.
    """
    while (line := file.readline(_LONGEST_LINE)).endswith(b"\n") and b"\0" not in line:
        if text := line[:-1].decode("utf-8", "replace"):
            yield _event(text)
    file.seek(-len(line), os.SEEK_CUR)


def timeline_is_full(path: Path) -> bool:
    """Return whether events are missing: the file reached its limit, or the disk was full."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LONGEST_LINE))
        return bool(file.read(_LONGEST_LINE).strip(b"\0"))


def _event(line: str) -> Event:
    """Return the event of one line."""
    tag, _, rest = line.partition(" ")
    if tag in ("P", "S", "N"):
        return Event(tag, (rest,), ())
    head, _, frames = rest.partition(" @")
    return Event(tag, tuple(head.split()), tuple(int(f, 16) for f in frames.split(",") if f))


@dataclass(frozen=True)
class Process:
    """One process of the machine, alive or ended; tuples are by device, sizes in bytes.

    Attributes:
        refused_at: the time of the last refused allocation; 0: no allocation was refused.
        allocated: memory that the process holds, or held at its end, without its context.
        context: memory of the process's CUDA context.
        late: memory of the scenario that the process holds since it asked for free memory.
        peak: the most memory that the process held, without its context.
        at_peak: memory that the process held, with its context, when all processes together held
            the most.
        pinned_peak: the most page-locked host memory that the process held.
    """

    pid: int
    refused_at: int
    alive: bool
    allocated: tuple[int, ...]
    context: tuple[int, ...]
    late: tuple[int, ...]
    peak: tuple[int, ...]
    at_peak: tuple[int, ...]
    pinned_peak: int

    @property
    def used(self) -> bool:
        return any(self.context) or any(self.peak) or self.pinned_peak > 0


@dataclass(frozen=True)
class SharedRecord:
    """The processes of a machine.

    ``peak`` has the most bytes that all processes held at one time, by device. ``allocations`` and
    ``pinned_allocations`` count what the processes asked for: device memory, page-locked memory.
    """

    processes: tuple[Process, ...]
    peak: tuple[int, ...]
    pinned_peak: int
    allocations: int = 0
    pinned_allocations: int = 0

    def held(self, device: int) -> int:
        """Return the bytes that living processes hold on a device.

        The bytes include CUDA contexts and `Process.late`, as the bytes of ``peak`` do.
        """
        alive = [p for p in self.processes if p.alive]
        return sum(p.allocated[device] + p.context[device] + p.late[device] for p in alive)


def read_shared(path: Path) -> SharedRecord:
    """Read the state of a machine's processes; the result is empty if there is no file yet.

    Raises:
        ValueError: another version of turbofit wrote the file.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    if len(data) < _HEAD.size or not any(data[:8]):
        return SharedRecord((), tuple([0] * _PINNED), 0)
    magic, used, _, *numbers = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError(f"{path} is no shared file of this version of turbofit")
    slots = (_SLOT.unpack_from(data, _HEAD.size + i * _SLOT.size) for i in range(used))
    peak = numbers[_ROWS : 2 * _ROWS]
    return SharedRecord(
        tuple(_process(slot) for slot in slots if slot[0]),
        tuple(peak[:_PINNED]),
        peak[_PINNED],
        *numbers[3 * _ROWS :],
    )


def _process(slot: tuple[int, ...]) -> Process:
    """Return the process of a slot in the shared file."""
    state, pid, started, _, refused_at, *rows = slot
    alive = state == _LIVE and lives(pid, started)
    # Each row ends with the page-locked host memory.
    allocated, context, late, peak, at_peak = (
        tuple(rows[i * _ROWS : i * _ROWS + _PINNED]) for i in range(5)
    )
    pinned = rows[3 * _ROWS + _PINNED]
    return Process(pid, refused_at, alive, allocated, context, late, peak, at_peak, pinned)


def lives(pid: int, started: int | None = None) -> bool:
    """Return whether process ``pid`` is alive.

    ``started`` is the start of the process in ticks after boot; a process with another start does
    not count.
    """
    began = start_time(pid)
    return began > 0 and started in (None, began)
