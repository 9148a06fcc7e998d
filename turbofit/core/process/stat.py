"""Reads ``/proc/PID/stat`` (proc(5)): whose child a process is, its group, start and time used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress


def stat_of(pid: int) -> list[str]:
    """Return the fields of ``stat`` after the name (state, parent, group, ...); [] on failure."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def every_stat() -> Iterator[tuple[int, list[str]]]:
    """Yield the id of each process, also of zombies, with the fields that `stat_of` returns.

    A system without ``/proc`` yields nothing.
    """
    with suppress(OSError):
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            if fields := stat_of(pid):
                yield pid, fields


def start_time(pid: int) -> int:
    """Return the start of a living process, in ticks of the kernel since boot; else 0."""
    fields = stat_of(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else 0


def group_of(pid: int) -> int:
    """Return the process group of a process; 0 if there is no such process."""
    fields = stat_of(pid)
    return int(fields[2]) if fields else 0


def members(group: int, leader_started: int) -> list[int]:
    """Return the ids of the living processes of a process group, which must be a whole session.

    Empty if the group's number now belongs to another leader: its `start_time` is not
    ``leader_started``.
    """
    if start_time(group) not in (0, leader_started):
        return []
    ours = [str(group)] * 2  # the process group and the session
    return [pid for pid, fields in every_stat() if fields[0] not in "ZX" and fields[2:4] == ours]


def processor_seconds(group: int) -> float:
    """Return processor seconds that the living processes of a group have used so far."""
    ours = [fields for _, fields in every_stat() if fields[2] == str(group)]
    used = sum(int(fields[11]) + int(fields[12]) for fields in ours)
    return used / os.sysconf("SC_CLK_TCK")
