"""The censuses of LMDeploy's released wheels, from `presets/engines/kernels/`.

One for each release whose kernels are others than those of the release before;
`scripts/new-lmdeploy --write` writes that of a new one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Final

from turbofit.core.presets import load_yaml, presets_dir
from turbofit.kernels.census import Census, Count

Version = tuple[int, int, int]

_ROOM: Final = "engines/kernels"


def released(version: Version) -> Census | None:
    """The census of TurboMind in a release; None before 0.6.0, of which there is none.

    A release newer than all is answered by the newest one.
    """
    first = _first(version)
    return None if first is None else _census(first)


def is_released(version: Version, digest: str) -> bool:
    """Whether a library is byte for byte the one of a released wheel.

    Args:
        version: LMDeploy's.
        digest: the library's SHA-256 as a wheel's ``RECORD`` has it.
    """
    first = _first(version)
    known = {} if first is None else _file(first).get("libraries", {})
    return digest in known.get(".".join(map(str, version)), ())


def _first(version: Version) -> Version | None:
    """The release whose file answers for a version."""
    return max((first for first in _firsts() if first <= version), default=None)


@cache
def _firsts() -> dict[Version, str]:
    names = [path.stem for path in (presets_dir() / _ROOM).glob("turbomind-*.yaml")]
    numbers = (map(int, name.partition("-")[2].split(".")) for name in names)
    return {(a, b, c): name for (a, b, c), name in zip(numbers, names, strict=True)}


@cache
def _file(first: Version) -> dict[str, Any]:
    return load_yaml(presets_dir() / _ROOM / f"{_firsts()[first]}.yaml")


@cache
def _census(first: Version) -> Census:
    data = _file(first)
    architectures = tuple(data["architectures"].split())
    return Census(
        library=data["library"],
        architectures=architectures,
        ptx=tuple(data["ptx"].split()),
        families={
            name: dict(zip(architectures, _counts(row), strict=True))
            for name, row in data["families"].items()
        },
    )


def _counts(row: str) -> Iterator[Count]:
    """``3 0+15``: three with code; none with code and 15 that are empty."""
    for cell in str(row).split():
        code, _, empty = cell.partition("+")
        yield Count(code=int(code), empty=int(empty or 0))
