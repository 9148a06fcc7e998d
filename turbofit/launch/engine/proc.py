"""Processes, from procfs."""

from __future__ import annotations

import os
from contextlib import suppress

__all__ = ["group_of", "members", "start_time"]


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
