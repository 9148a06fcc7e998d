"""The members of a process group, and the processor time that they have used."""

from __future__ import annotations

import os

from turbofit.core.process.stat import every_stat, start_time, stat_of


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
