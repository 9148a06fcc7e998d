"""The host's memory and CPUs that this process may use."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from turbofit.core.machine import Host
from turbofit.core.struct import NA, NaType
from turbofit.core.units import KIB

#: From this size on, a limit counts as none: cgroup v1 writes "no limit" as a huge number.
_NO_LIMIT = 1 << 60


def read_host(
    *, proc: str = "/proc", cgroup: str = "/sys/fs/cgroup", shm: str = "/dev/shm"
) -> Host:
    """Read the host's figures from the kernel; a figure that cannot be read is ``NA``."""
    info = _fields(Path(proc) / "meminfo")
    total, available = info.get("MemTotal", NA), info.get("MemAvailable", NA)
    for limit, usage in _cgroup_limits(Path(proc), Path(cgroup)):
        total = limit if total == NA else min(total, limit)
        left = max(0, limit - usage)
        available = left if available == NA else min(available, left)
    return Host(
        ram_total=total,
        ram_available=available,
        shm_available=_free(shm),
        cpus=usable_cores(proc=proc, cgroup=cgroup),
    )


def usable_cores(*, proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> int | NaType:
    """Return the number of cores that this process may use, by its affinity and a cgroup's quota.

    The number is rounded down: a quota of 3.5 cores counts as 3; but a quota below 1 counts as 1.
    """
    limits = _quotas(Path(proc), Path(cgroup))
    try:
        limits.append(len(os.sched_getaffinity(0)))
    except (AttributeError, OSError):
        limits += filter(None, [os.cpu_count()])
    return min(limits, default=NA)


def host_kills(*, proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> int | None:
    """Return how many processes the kernel has killed for lack of memory; None if unknown.

    The number covers the innermost of our cgroups for which the kernel counts kills. Without such a
    cgroup, the number covers the whole machine.
    """
    own = (group for group, old in _cgroups_of(Path(proc), Path(cgroup), "memory") if not old)
    for path in (*(group / "memory.events" for group in own), Path(proc) / "vmstat"):
        counted = re.search(r"(?m)^oom_kill (\d+)$", _text(path))
        if counted is not None:
            return int(counted[1])
    return None


def _fields(path: Path) -> dict[str, int]:
    """Return the fields of a file such as meminfo; sizes are in bytes."""
    fields: dict[str, int] = {}
    for line in _text(path).splitlines():
        name, *rest = line.replace(":", " ").split() or [""]
        if rest and rest[0].isdigit():
            fields[name] = int(rest[0]) * (KIB if rest[1:] == ["kB"] else 1)
    return fields


def _cgroup_limits(proc: Path, root: Path) -> list[tuple[int, int]]:
    """Return (limit, usage) in bytes of each memory cgroup of this process, and of its parents.

    File pages that the kernel drops before it kills a process do not count as used.
    """
    limits = []
    for folder, old in _cgroups_of(proc, root, "memory"):
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if old
            else ("memory.max", "memory.current", "inactive_file")
        )
        limit, usage = _number(folder / names[0]), _number(folder / names[1])
        if limit is not None and usage is not None and limit < _NO_LIMIT:
            cache = _fields(folder / "memory.stat").get(names[2], 0)
            limits.append((limit, max(0, usage - cache)))
    return limits


def _quotas(proc: Path, root: Path) -> list[int]:
    """Return the quota, in whole cores, of each CPU cgroup of this process, and of its parents."""
    quotas = []
    for folder, old in _cgroups_of(proc, root, "cpu"):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if old else ("cpu.max",)
        numbers = [word for name in names for word in _text(folder / name).split()]
        if len(numbers) == 2 and all(word.isdecimal() and int(word) for word in numbers):
            quotas.append(max(1, int(numbers[0]) // int(numbers[1])))
    return quotas


def _cgroups_of(proc: Path, root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Yield each cgroup's folder for a controller, and whether it is of cgroup version 1.

    The process's own group comes first, then its parents. In a container, some of these folders
    may not exist.
    """
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers or controller in controllers.split(","):
            base = root / controller if controllers else root
            parts = [part for part in path.split("/") if part and part != ".."]
            for depth in range(len(parts), -1, -1):
                yield base.joinpath(*parts[:depth]), bool(controllers)


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _free(path: str) -> int | NaType:
    try:
        stat = os.statvfs(path)
    except (AttributeError, OSError):  # Windows has no statvfs
        return NA
    return stat.f_bavail * stat.f_frsize


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
