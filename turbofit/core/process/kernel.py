"""What the Linux kernel says of processes, in ``/proc`` and of our control group."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path


def host_kills(*, proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> int | None:
    """Return how many processes the kernel has killed for lack of memory; None if unknown.

    The number is of our control group, or of the whole machine if the kernel counts no groups.
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


def _group(proc: Path) -> str:
    """Return the path of our control group (version 2) below its mount; empty if there is none."""
    with suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
            if line.startswith("0::"):
                return line[3:].strip().lstrip("/")
    return ""


def start_time(pid: int) -> int:
    """Return when a process started, in ticks of the kernel since boot; 0 if it does not live."""
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 and fields[0] != "Z" else 0


def group_of(pid: int) -> int:
    """Return the process group of a process; 0 if there is no such process."""
    fields = _stat(pid)
    return int(fields[2]) if len(fields) > 2 else 0


def members(group: int, leader_started: int) -> list[int]:
    """Return the ids of the living processes in a process group that is a session of its own.

    Empty if the group's number now belongs to another leader: its `start_time` is not
    ``leader_started``.
    """
    leader = start_time(group)
    if leader and leader != leader_started:
        return []
    pids = []
    with suppress(OSError):
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                fields = _stat(int(entry))
                if len(fields) > 19 and fields[0] != "Z" and fields[2:4] == [str(group)] * 2:
                    pids.append(int(entry))
    return pids


def processor_seconds(group: int) -> float:
    """Return processor seconds that the living processes of a group have used so far."""
    used = 0
    with suppress(OSError):
        for entry in filter(str.isdigit, os.listdir("/proc")):
            fields = _stat(int(entry))
            if len(fields) > 12 and fields[2] == str(group):
                used += int(fields[11]) + int(fields[12])
    return used / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """Return the fields of ``stat`` after the name (state, parent, group, ...); [] on failure."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []
