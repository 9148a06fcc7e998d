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
    """One process of the machine, alive or as it ended.

    Attributes:
        pid: its number.
        started: ticks since boot at which it began.
        began: when it first called CUDA.
        refused_at: when an allocation of its was last refused, 0 for never.
        alive: whether it still lives.
        held: what it holds on each device (at its end, where it is dead), without its context.
        context: its context on each device.
        late: what was gone of each device once it had asked for the free memory.
        peak: what it held at most on each device.
        at_peak: what it had, all in all, when the machine's processes together had most.
        pinned: page-locked host memory.
        pinned_peak: the same at most.
    """

    pid: int
    started: int
    began: int
    refused_at: int
    alive: bool
    held: tuple[int, ...]
    context: tuple[int, ...]
    late: tuple[int, ...]
    peak: tuple[int, ...]
    at_peak: tuple[int, ...]
    pinned: int
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
        found = [(p, p.held[device] + p.context[device]) for p in self.processes if p.alive]
        return [(process, size) for process, size in found if size]


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
    state, pid, started, began, refused_at, *rows = slot
    held, context, late, peak, at_peak = (
        tuple(rows[i * _ROWS : (i + 1) * _ROWS]) for i in range(5)
    )
    return Process(
        pid=pid,
        started=started,
        began=began,
        refused_at=refused_at,
        alive=state == _LIVE and lives(pid, started),
        held=held[:_PINNED],
        context=context[:_PINNED],
        late=late[:_PINNED],
        peak=peak[:_PINNED],
        at_peak=at_peak[:_PINNED],
        pinned=held[_PINNED],
        pinned_peak=peak[_PINNED],
    )


def lives(pid: int, started: int | None = None) -> bool:
    """Whether a process lives, which began so many ticks after boot."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    fields = text.rpartition(")")[2].split()
    return fields[0] not in "ZX" and started in (None, int(fields[19]))
