"""Host memory and CPUs, as the process may use them."""

from __future__ import annotations

import os
from pathlib import Path

from turbofit.core.machine import Host
from turbofit.core.struct import NA, NaType
from turbofit.core.units import KIB

#: cgroup v1 says "no limit" with the largest multiple of a page; anything near it is none.
_NO_LIMIT = 1 << 60


def read_host(
    *, proc: str = "/proc", cgroup: str = "/sys/fs/cgroup", shm: str = "/dev/shm"
) -> Host:
    """Read what the kernel says; what cannot be read is ``NA``."""
    info = _fields(Path(proc) / "meminfo")
    total, available = info.get("MemTotal", NA), info.get("MemAvailable", NA)
    for limit, usage in _cgroup_limits(Path(proc), Path(cgroup)):
        total = limit if total == NA else min(total, limit)
        left = max(0, limit - usage)
        available = left if available == NA else min(available, left)
    return Host(ram_total=total, ram_available=available, shm_available=_free(shm), cpus=_cpus())


def _fields(path: Path) -> dict[str, int]:
    """Bytes by field."""
    fields: dict[str, int] = {}
    for line in _text(path).splitlines():
        name, *rest = line.replace(":", " ").split() or [""]
        if rest and rest[0].isdigit():
            fields[name] = int(rest[0]) * (KIB if rest[1:] == ["kB"] else 1)
    return fields


def _cgroup_limits(proc: Path, root: Path) -> list[tuple[int, int]]:
    """(limit, usage) in bytes of every memory group that this process is in, its parents too.

    File pages that the kernel drops before it kills anybody do not count as used.
    """
    limits = []
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        for folder in _upwards(base, path):
            limit, usage = _number(folder / names[0]), _number(folder / names[1])
            if limit is not None and usage is not None and limit < _NO_LIMIT:
                cache = _fields(folder / "memory.stat").get(names[2], 0)
                limits.append((limit, max(0, usage - cache)))
    return limits


def _upwards(base: Path, path: str) -> list[Path]:
    """The group's folder and all above it, some of which a container's mount lacks."""
    parts = [part for part in path.split("/") if part and part != ".."]
    return [base.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _free(path: str) -> int | NaType:
    try:
        stat = os.statvfs(path)
    except (AttributeError, OSError):  # Windows has no statvfs
        return NA
    return stat.f_bavail * stat.f_frsize


def _cpus() -> int | NaType:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count() or NA


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
