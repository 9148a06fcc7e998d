"""What a server holds at a moment, and whether it grows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Final, NamedTuple

from bench.proc import cpu_seconds, resident_mib

#: Of the samples, in parts: the first of them is the warm-up and counts for nothing.
_PARTS: Final = 10
#: Of a connection, in the kernel's table.
_ESTABLISHED: Final = "01"
#: What the last part may have beyond the one after the warm-up.
TOLERANCES: Final = {
    "memory": "8 MiB and 5 %", "descriptors": "4", "threads": "2",
    "disk": "25 % and 256 bytes more a request",
    "processor time": "25 % and 0.2 ms more a request", "added p50": "1 ms and 25 %",
    "added p90": "3 ms and 50 %",
}  # fmt: skip


class Sample(NamedTuple):
    """One moment: seconds since the start, bytes in memory and on disk, added milliseconds.

    ``descriptors`` are those beside the ``connections`` that clients hold open: how many those are
    is theirs to say. One that its client has closed is a descriptor. ``processor`` is the time
    that the process has used so far, in milliseconds.
    """

    at: float
    memory: int
    descriptors: int
    connections: int
    threads: int
    disk: int
    processor: int
    requests: int
    faults: int
    added: tuple[float, ...]


def taken(pid: int, port: int, folder: Path) -> dict[str, int]:
    """What a process that listens on a port, and its folder, hold now."""
    connections = _connections(pid, port)
    return {
        "memory": int(resident_mib(pid) * (1 << 20)),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")) - connections,
        "connections": connections,
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "processor": int(1000 * cpu_seconds(pid)),
        "disk": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    }


def _connections(pid: int, port: int) -> int:
    """Accepted IPv4 connections to a port that neither side has closed (proc(5), net/tcp)."""
    rows = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    local, state, inode = 1, 3, 9  # before it is accepted, its inode is 0
    return sum(
        row[local].endswith(f":{port:04X}") and row[state] == _ESTABLISHED and row[inode] != "0"
        for row in map(str.split, rows)
    )


class Verdict(NamedTuple):
    """One figure at the beginning and at the end, and whether it stayed."""

    what: str
    first: float
    last: float
    flat: bool


def verdict(samples: Sequence[Sample]) -> list[Verdict]:
    """The second tenth of the time beside the last.

    Raises:
        ValueError: fewer samples than there are parts.
    """
    size = len(samples) // _PARTS
    if not size:
        raise ValueError(f"{len(samples)} samples are too few: {_PARTS} at least")
    first, last = samples[size : 2 * size], samples[-size:]
    rows = []
    for name, more, share in (("memory", 8 << 20, 0.05), ("descriptors", 4, 0), ("threads", 2, 0)):
        a, b = (median(getattr(one, name) for one in part) for part in (first, last))
        rows.append(Verdict(name, a, b, b <= a * (1 + share) + more))
    middle = len(samples) // 2
    # Over halves: one fault costs three times what another does, and a tenth has few of them.
    for name, what, more in (("disk", "disk", 256), ("processor time", "processor", 0.2)):
        a, b = (_a_request(what, part) for part in (samples[size:middle], samples[middle:]))
        rows.append(Verdict(name, a, b, b <= a * 1.25 + more))
    late = [[x for one in part for x in one.added] for part in (first, last)]
    if min(map(len, late)) > 1:
        for what, place, more, share in (("added p50", 4, 1.0, 0.25), ("added p90", 8, 3.0, 0.5)):
            a, b = (quantiles(part, n=10)[place] for part in late)
            rows.append(Verdict(what, a, b, b <= a + max(0.0, a) * share + more))
    return rows


def _a_request(what: str, samples: Sequence[Sample]) -> float:
    """By how much a figure grew for each request."""
    grown = getattr(samples[-1], what) - getattr(samples[0], what)
    return grown / max(1, samples[-1].requests - samples[0].requests)


def shown(value: float) -> str:
    """A figure as people read it."""
    return f"{value:,.2f}" if value % 1 and value < 1000 else f"{value:,.0f}"
