"""NCCL: LMDeploy's wheel demands CUDA 12's, torch's CUDA 13's, and both own one file.

Both have the soname ``libnccl.so.2``, link CUDA's runtime statically, and export what TurboMind
imports (NCCL 2.29.7 and 2.32.3; LMDeploy 0.16 to 0.18): TurboMind minds neither. pip writes
CUDA 12's last; uv writes either last, by chance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.diagnose.doctor.finding import Finding, ok, stops, unreadable, warning
from turbofit.memory.versions import parse

if TYPE_CHECKING:
    from turbofit.diagnose.doctor.sources import Sources

__all__ = ["nccl_finding"]

_WHEELS: Final = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")
_FILE: Final = "libnccl.so.2"
_WHY: Final = "TurboMind and torch load it at their start, whatever tp is"


def nccl_finding(sources: Sources) -> Finding:
    """Which wheel's library is on the disk, told by its size."""
    check = "nccl"
    found = [
        (f"{name} {sources.version(name)}", *recorded)
        for name in _WHEELS
        if (recorded := sources.recorded(name, _FILE)) is not None
    ]
    if not found:
        return unreadable(check, f"no wheel has {_FILE}", f"{_WHY}; a system may have it")
    names = " and ".join(name for name, _, _ in found)
    try:
        size = found[0][1].stat().st_size
    except OSError:
        return stops(
            check,
            f"{_FILE} of {names} is gone",
            f"{_WHY}; to uninstall one of two wheels removes the file of both",
            f"pip install --force-reinstall --no-deps {found[0][0].replace(' ', '==')}",
        )
    if len(found) == 1:
        return ok(check, names)
    complete = [name for name, _, recorded in found if recorded == size]
    if len(complete) != 1:
        return unreadable(check, f"whose {_FILE} is there: {names}", _WHY)
    overwritten = next(name for name, _, _ in found if name != complete[0])
    seen = f"{complete[0]}, written over {overwritten}: both own {_FILE}"
    if (parse(complete[0].split()[1]) or ()) < (parse(overwritten.split()[1]) or ()):
        return warning(
            check,
            seen,
            "it is older than the one that the other package was built for",
            f"pip install --force-reinstall --no-deps {overwritten.replace(' ', '==')}",
        )
    return ok(check, seen)
