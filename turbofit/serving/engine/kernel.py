"""Reads from the kernel: processes, and how many it killed for lack of memory."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path


def host_kills(*, proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> int | None:
    """Number of processes killed for lack of memory in our control group, else on the machine."""
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
    """Our control group below its mount (version 2)."""
    with suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
            if line.startswith("0::"):
                return line[3:].strip().lstrip("/")
    return ""


def start_time(pid: int) -> int:
    """A process's start time, in the kernel's ticks since boot; 0 if there is no such process."""
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 and fields[0] != "Z" else 0


def group_of(pid: int) -> int:
    """The process group of a process; 0 if there is none."""
    fields = _stat(pid)
    return int(fields[2]) if len(fields) > 2 else 0


def members(group: int, leader_started: int) -> list[int]:
    """Process ids of a session's group that still live, if its leader started at that time.

    Empty if the group's number now belongs to another leader.
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
    """Processor seconds that the living processes of a group have used so far."""
    used = 0
    with suppress(OSError):
        for entry in filter(str.isdigit, os.listdir("/proc")):
            fields = _stat(int(entry))
            if len(fields) > 12 and fields[2] == str(group):
                used += int(fields[11]) + int(fields[12])
    return used / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """The fields of ``stat`` after the name: state, parent, group and so on; empty if it fails."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []
