"""What the kernel tells: processes, those that it killed for memory, the driver's Xid errors."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

_XID: Final = re.compile(r"NVRM: Xid \(([^)]*)\): (\d+)")
_WORDS: Final = {
    13: "a kernel of the engine read or wrote beyond its memory",
    31: "a kernel of the engine touched memory that is not mapped",
    43: "the driver reset the engine's channel after an error of its own",
    45: "the driver cleaned up after an earlier error",
    48: "an uncorrectable ECC error: watch this card",
    61: "the card's own microcontroller failed: power-cycle the machine",
    62: "the card's own microcontroller failed: power-cycle the machine",
    63: "ECC: memory was retired or a row remapped; a reboot completes it",
    64: "ECC: a row could not be remapped: the card needs service",
    74: "an NVLink error: check the bridge or the switch",
    79: "the card has fallen off the bus: power, heat or seat; the machine must be rebooted",
    92: "many correctable ECC errors: watch this card",
    94: "a contained ECC error: this engine's work is lost, the card goes on",
    95: "an uncontained ECC error: the card must be reset",
    119: "the card's GSP firmware does not answer: the machine must be rebooted",
    120: "the card's GSP firmware failed: the machine must be rebooted",
}
_MOST: Final = 1 << 20


def uptime() -> float:
    """Seconds on the kernel log's clock."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def host_kills(*, proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> int | None:
    """Processes killed for want of memory so far: of our control group, else of the machine.

    None where neither can be read.
    """
    for path in (
        Path(cgroup) / _group(Path(proc)) / "memory.events",
        Path(cgroup) / "memory.events",
        Path(proc) / "vmstat",
    ):
        with suppress(OSError):
            counted = re.search(r"(?m)^oom_kill (\d+)$", path.read_text(errors="replace"))
            if counted is not None:
                return int(counted[1])
    return None


def driver_errors(since: float, path: str = "/dev/kmsg") -> tuple[str, ...]:
    """The driver's Xid errors since a time of `uptime`, in words; empty where nobody may read."""
    found: list[str] = []
    for line in _log(path):
        head, _, text = line.partition(";")
        match = _XID.search(text)
        fields = head.split(",")
        if match is None or len(fields) < 3 or not fields[2].isdigit():
            continue
        if int(fields[2]) / 1e6 >= since:
            number = int(match[2])
            said = f"Xid {number} on {match[1].removeprefix('PCI:')}"
            found.append(f"{said}: {_WORDS[number]}" if number in _WORDS else said)
    return tuple(dict.fromkeys(found))


def _log(path: str) -> list[str]:
    """Records of the kernel's log: one a read, until there is none."""
    records: list[str] = []
    with suppress(OSError), open(path, "rb", buffering=0, opener=_open_quickly) as log:
        while len(records) < _MOST:
            with suppress(BrokenPipeError):  # overwritten while we read: go on with the next
                record = log.read(8192)
                if not record:
                    break
                records += record.decode(errors="replace").splitlines()
    return records


def _open_quickly(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _group(proc: Path) -> str:
    """Our control group below its mount (version 2)."""
    with suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
            if line.startswith("0::"):
                return line[3:].strip().lstrip("/")
    return ""


def start_time(pid: int) -> int:
    """When a process began, in the kernel's ticks since boot; 0 where there is none."""
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 and fields[0] != "Z" else 0


def group_of(pid: int) -> int:
    """The process group of a process; 0 where there is none."""
    fields = _stat(pid)
    return int(fields[2]) if len(fields) > 2 else 0


def members(group: int, leader_started: int) -> list[int]:
    """Living processes of a group that began with a certain leader, and with it a session.

    Empty where the group's number now belongs to another leader.
    """
    leader = start_time(group)
    if leader and leader != leader_started:
        return []
    found = []
    with suppress(OSError):
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                fields = _stat(int(entry))
                if len(fields) > 19 and fields[0] != "Z" and fields[2:4] == [str(group)] * 2:
                    found.append(int(entry))
    return found


def _stat(pid: int) -> list[str]:
    """The fields of ``stat`` after the name: state, parent, group and so on."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []
