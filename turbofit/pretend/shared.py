"""Reads the file that the processes of a pretend machine share (its layout: csrc/shared.h).

Sizes are bytes, times nanoseconds of CLOCK_MONOTONIC, devices the machine's own indices. Nothing is
locked: each number is whole, but numbers that change together may be read apart.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

_MAGIC = 0x3230454D46425254
_ROWS = 17  # 16 devices, and page-locked host memory
_PINNED = _ROWS - 1
_HEAD = struct.Struct(f"<QII{_ROWS}Q{_ROWS}Q{_ROWS}Q64x2Q")
_SLOT = struct.Struct(f"<IiQQQ{5 * _ROWS}Q")
_LIVE = 1


@dataclass(frozen=True)
class Process:
    """One process of the machine, alive or as it ended; tuples go by device.

    Attributes:
        pid: its number.
        refused_at: when an allocation of its was last refused, 0 for never.
        alive: whether it still lives.
        allocated: what it holds (at its end, where it is dead), without its context.
        context: its context.
        late: what was gone once it had asked for the free memory.
        peak: what it held at most.
        at_peak: what it had, all in all, when the machine's processes together had most.
        pinned_peak: page-locked host memory at most.
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
        """Whether it ever had a context, device memory or page-locked memory."""
        return any(self.context) or any(self.peak) or self.pinned_peak > 0


@dataclass(frozen=True)
class SharedRecord:
    """All processes that were on the machine, and what each device had at most, together.

    ``allocations`` and ``pinned_allocations`` are how many were asked for, of devices and of
    page-locked host memory, by all processes since the machine began.
    """

    processes: tuple[Process, ...]
    peak: tuple[int, ...]
    pinned_peak: int
    allocations: int = 0
    pinned_allocations: int = 0

    def holders(self, device: int) -> list[tuple[Process, int]]:
        """The living processes with something on a device, and how much, contexts included."""
        holders = [(p, p.allocated[device] + p.context[device]) for p in self.processes if p.alive]
        return [(process, size) for process, size in holders if size]


def read_shared(path: Path) -> SharedRecord:
    """The state of a machine's processes; empty where none called CUDA yet.

    Raises:
        ValueError: the file is not one of this turbofit's.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    if len(data) < _HEAD.size or not any(data[:8]):
        return SharedRecord((), (0,) * _PINNED, 0)
    magic, used, _, *numbers = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError(f"{path} is not a shared account of this turbofit")
    slots = (_SLOT.unpack_from(data, _HEAD.size + i * _SLOT.size) for i in range(used))
    peak = numbers[_ROWS : 2 * _ROWS]
    return SharedRecord(
        tuple(_process(slot) for slot in slots if slot[0]),
        tuple(peak[:_PINNED]),
        peak[_PINNED],
        *numbers[3 * _ROWS :],
    )


def _process(slot: tuple[int, ...]) -> Process:
    state, pid, started, _, refused_at, *rows = slot
    alive = state == _LIVE and lives(pid, started)
    # Each row ends with page-locked host memory.
    allocated, context, late, peak, at_peak = (
        tuple(rows[i * _ROWS : i * _ROWS + _PINNED]) for i in range(5)
    )
    pinned = rows[3 * _ROWS + _PINNED]
    return Process(pid, refused_at, alive, allocated, context, late, peak, at_peak, pinned)


def lives(pid: int, started: int | None = None) -> bool:
    """Whether a process lives, which began so many ticks after boot."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    fields = text.rpartition(")")[2].split()
    return fields[0] not in "ZX" and started in (None, int(fields[19]))
