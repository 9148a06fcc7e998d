"""Runs a command, and reads ``/proc/PID/stat`` (proc(5)) of processes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress


def output_of(
    words: Sequence[str], seconds: float, env: Mapping[str, str] | None = None
) -> bytes | None:
    """Return a command's output; None if the command does not start, fails, or takes too long."""
    try:
        return subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=True,
            env=None if env is None else dict(env),
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None


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
