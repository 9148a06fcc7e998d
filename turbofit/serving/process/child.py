"""Starts child processes under the guard, each in a process group; reads what a group has used."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from turbofit.core.process.processes import every_stat, start_time, stat_of
from turbofit.serving.process.guard import guarded


def child(
    words: Sequence[str],
    env: Mapping[str, str] | None = None,
    *,
    stdin: int = subprocess.DEVNULL,
    stderr: int | IO[bytes] = subprocess.STDOUT,
    outlives: bool = False,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start a command, with its output in a pipe, in a process group that Ctrl-C does not reach.

    ``outlives``: the command may outlive this process. Otherwise the kernel kills the command and
    its descendants when the calling thread ends, so call this in the main thread.

    Raises:
        OSError: the command cannot be started.
    """
    return subprocess.Popen(
        list(words) if outlives else guarded(words),
        env=None if env is None else dict(env),
        stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True, cwd=cwd,
    )  # fmt: skip


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
