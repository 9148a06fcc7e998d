"""LMDeploy's versions: which one is planned for, and whose account answers for another."""

from __future__ import annotations

import re
from functools import cache
from typing import Final

from turbofit.core.presets import presets_dir

__all__ = [
    "FIRST_CURRENT",
    "OLDEST_SERVED",
    "REFERENCE",
    "Version",
    "account_version",
    "doubt",
    "is_legacy",
    "parse",
    "release",
    "written",
]

Version = tuple[int, int, int]

#: What plans are for where nobody names a version.
REFERENCE: Final = "0.18"
#: The first version with presets of its own, ``presets/engines/ENGINE-X.Y.yaml``. Older ones are
#: entries of ``generations.yaml``, which say what was different from this one: it stays theirs
#: whatever the reference becomes.
FIRST_CURRENT: Final = "0.18"

#: The oldest release that `serve` launches.
OLDEST_SERVED: Final = (0, 16)

_NUMBERS: Final = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")


def written(version: str) -> tuple[int, ...]:
    """The two or three numbers that a version is written with; none where it is no version."""
    match = _NUMBERS.search(version)
    return () if match is None else tuple(int(number) for number in match.groups() if number)


def parse(version: str) -> Version | None:
    """The numbers of a version such as ``0.6``, ``v0.5.2.post1``; None where there are none."""
    numbers = written(version)
    return (numbers[0], numbers[1], numbers[2] if len(numbers) > 2 else 0) if numbers else None


def release(version: str) -> tuple[int, int]:
    """The first two numbers, which an account is for; (0, 0) where there are none."""
    return (parse(version) or (0, 0, 0))[:2]


def is_legacy(version: str) -> bool:
    """Whether a version is an entry of ``generations.yaml``."""
    wanted, first = parse(version), parse(FIRST_CURRENT)
    return wanted is not None and first is not None and wanted < first


def account_version(engine: str, version: str | None = None) -> str | None:
    """The version whose presets answer for another: its own, or the nearest older one's.

    Args:
        engine: ``turbomind`` or ``pytorch``.
        version: LMDeploy's; None is the reference.

    Returns:
        The version as the presets name it; None where all are newer, or it is no version.
    """
    wanted = release(version or REFERENCE)
    older = [preset for preset in _presets(engine) if preset[0][:2] <= wanted]
    return max(older)[1] if older else None


def doubt(engine: str, version: str | None) -> str | None:
    """What is doubtful about a version that another one's account answers for."""
    preset = account_version(engine, version)
    if preset is None or release(preset) == release(version or REFERENCE):
        return None
    return (
        f"LMDeploy {version} is newer than {preset}, whose memory account this is: margins are"
        " doubled"
    )


@cache
def _presets(engine: str) -> tuple[tuple[Version, str], ...]:
    """The versions with presets of their own."""
    names = (path.stem for path in (presets_dir() / "engines").glob(f"{engine}-*.yaml"))
    found = ((parse(name), name.removeprefix(f"{engine}-")) for name in names)
    return tuple((version, name) for version, name in found if version is not None)
