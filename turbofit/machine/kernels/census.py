"""Counts a library's kernels for each architecture: kernels with code, and empty kernels.

The folder `presets/engines/kernels/` has a census for each release of LMDeploy that changed the
kernels. `scripts/new-lmdeploy --write` adds the census of a new release. This module takes the
census of any other library, and stores it.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from turbofit.core.errors import TurbofitError
from turbofit.core.presets import load_yaml, presets_dir
from turbofit.core.process.files import StateFile
from turbofit.core.process.log import LazyLogger
from turbofit.core.struct import Struct

#: Compute capabilities of Jetson (developer.nvidia.com/cuda-gpus): Nano, TX2, Xavier, Orin, Thor.
_TEGRA: Final = frozenset({(5, 3), (6, 2), (7, 2), (8, 7), (10, 1), (11, 0)})
Version = tuple[int, int, int]

_ROOM: Final = "engines/kernels"
_LOG: Final = LazyLogger(__name__)
_LIBRARY: Final = re.compile(r"_turbomind\.[\w.-]*so$")


class Count(Struct):
    """The numbers of kernels in one family for one architecture: with code, and empty."""

    code: int = 0
    empty: int = 0


class Census(Struct):
    """The device code of one library.

    ``architectures`` are the architectures of its cubins, as CUDA names them without ``sm_``:
    ``86`` runs on compute capability 8.6 and newer ones of 8.x, ``90a`` only on 9.0. ``ptx`` are
    the architectures of its PTX, which the driver compiles for newer cards. ``families`` has the
    numbers of kernels by family and architecture.
    """

    library: str
    architectures: tuple[str, ...]
    ptx: tuple[str, ...]
    families: dict[str, dict[str, Count]]

    def architecture(self, capability: tuple[int, int]) -> str | None:
        """Return the architecture whose cubins run on this compute capability, or None.

        Source: CUDA C++ Programming Guide, "Feature Availability", "Binary Compatibility": code for
        an older architecture is guaranteed to run on desktop cards, but not on Tegra.
        """
        major, minor = capability
        exact = (f"{major}{minor}a", f"{major}{minor}")
        older = (f"{major}{k}" for k in range(minor - 1, -1, -1))
        wanted = exact if capability in _TEGRA else (*exact, *older)
        return next((name for name in wanted if name in self.architectures), None)

    def has_ptx(self, capability: tuple[int, int]) -> bool:
        """Return whether the driver can compile a part of the PTX for this compute capability."""
        number = capability[0] * 10 + capability[1]
        return any(name.isdigit() and int(name) <= number for name in self.ptx)

    def runs(self, capability: tuple[int, int]) -> bool:
        """Return whether a card of this compute capability can run any of the code."""
        return self.architecture(capability) is not None or self.has_ptx(capability)

    def architecture_names(self) -> str:
        """Return the architectures in words for a message: ``sm_70, sm_75``."""
        return ", ".join(f"sm_{name}" for name in self.architectures)

    def count(self, names: Iterable[str], architecture: str) -> Count:
        """Return the numbers of kernels in these families, together, for one architecture."""
        counts = [self.families.get(name, {}).get(architecture, Count()) for name in names]
        return Count(
            code=sum(count.code for count in counts), empty=sum(count.empty for count in counts)
        )


def take_census(library: Path) -> Census:
    """Count the kernels in TurboMind's library; this takes a second for 0.4 GB.

    Raises:
        OSError: the library, or the C++ library, cannot be read.
        ValueError: the file is not a library, or its device code is broken.
        PackageError: cramjam is missing.
    """
    from turbofit.machine.kernels.device_code import entries, functions
    from turbofit.machine.kernels.families import demangle, family

    built, ptx = set[str](), set[str]()
    functions_of = Counter[tuple[str, str, bool]]()
    for architecture, cubin in entries(library):
        (ptx if cubin is None else built).add(architecture)
        for name, empty in functions(cubin) if cubin is not None else ():
            functions_of[name, architecture, empty] += 1
    names = {name: family(demangle(name)) for name in {name for name, _, _ in functions_of}}
    # By family and architecture: the number of functions with code, and of empty ones.
    counts: dict[str, dict[str, list[int]]] = {}
    for (name, architecture, empty), count in functions_of.items():
        if kernel_family := names[name]:
            counts.setdefault(kernel_family, {}).setdefault(architecture, [0, 0])[empty] += count
    return Census(
        library=library.name,
        # Sorted by number: 90 stands before 100.
        architectures=tuple(sorted(built, key=lambda name: (len(name.rstrip("af")), name))),
        ptx=tuple(sorted(ptx, key=lambda name: (len(name.rstrip("af")), name))),
        families={
            name: {
                key: Count(code=code, empty=empty) for key, (code, empty) in by_architecture.items()
            }
            for name, by_architecture in sorted(counts.items())
        },
    )


def released(version: Version) -> Census | None:
    """Return the census of a release; None before 0.6.0.

    A release without a census of its own has the kernels of the newest older census.
    """
    first = _first(version)
    return None if first is None else _census(first)


def is_released(version: Version, digest: str) -> bool:
    """Return whether a library with this SHA-256, as in ``RECORD``, is from a release's wheel."""
    first = _first(version)
    known = {} if first is None else _file(first).get("libraries", {})
    return digest in known.get(".".join(map(str, version)), ())


def _first(version: Version) -> Version | None:
    """Return the release whose census file applies to a version; None if the version is older."""
    return max((first for first in _firsts() if first <= version), default=None)


@cache
def _firsts() -> dict[Version, str]:
    """Return the file name of each stored census, by the first release of the census."""
    names = [path.stem for path in (presets_dir() / _ROOM).glob("turbomind-*.yaml")]
    numbers = (map(int, name.partition("-")[2].split(".")) for name in names)
    return {(a, b, c): name for (a, b, c), name in zip(numbers, names, strict=True)}


@cache
def _file(first: Version) -> dict[str, Any]:
    return load_yaml(presets_dir() / _ROOM / f"{_firsts()[first]}.yaml")


@cache
def _census(first: Version) -> Census:
    """Return the stored census whose first release is ``first``."""
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
    """Yield the counts of a row such as ``3 0+15``.

    ``3`` means three kernels with code; ``0+15`` means none with code, and 15 empty kernels.
    """
    for cell in str(row).split():
        code, _, empty = cell.partition("+")
        yield Count(code=int(code), empty=int(empty or 0))


class _Engine(NamedTuple):
    """The installed LMDeploy by its ``RECORD``: version, library, and the library's SHA-256."""

    version: Version | None
    library: Path | None = None
    digest: str | None = None


def _engine() -> _Engine:
    """Read the installed LMDeploy's version, library and SHA-256; all None without LMDeploy."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        package = distribution("lmdeploy")
    except PackageNotFoundError:
        return _Engine(None)
    number = re.match(r"(\d+)\.(\d+)\.(\d+)", package.version)
    version = (int(number[1]), int(number[2]), int(number[3])) if number else None
    file = next((file for file in package.files or () if _LIBRARY.search(file.name)), None)
    if file is None:
        return _Engine(version)
    path, recorded = Path(str(file.locate())), file.hash
    digest = recorded.value if recorded and recorded.mode == "sha256" else None
    return _Engine(version, path if path.is_file() else None, digest)


@cache
def installed() -> Census | None:
    """Return the census of the installed TurboMind; None if TurboMind is not installed.

    A release's own library has the release's census. Any other library is read once, and its census
    is stored. If the library cannot be read, the release with its version gives the census.
    """
    version, library, digest = _engine()
    if version is not None and digest is not None and is_released(version, digest):
        return released(version)
    if library is None:
        return None
    try:
        return census_of(library)
    except (OSError, ValueError, TurbofitError) as exc:
        _LOG.info("the kernels of %s are not read: %s", library.name, exc)
        return None if version is None else released(version)


def turbomind_library() -> Path | None:
    """Return the path of the installed TurboMind's library; None if there is none."""
    return _engine().library


def census_of(library: Path) -> Census:
    """Return the census of a library, taken once (`take_census`) and stored.

    The name of the stored file has the library's size, and the time of the library's last change.
    """
    facts = library.stat()
    kept = StateFile("kernels", f"{facts.st_size}-{facts.st_mtime_ns}", Census)
    census = kept.read()
    if census is None:
        census = take_census(library)
        kept.write(census)
    return census


@cache
def torch_takes_a_share() -> bool:
    """Return whether torch has the option that limits its allocator to a share of a card.

    torch aborts on an unknown option. The function therefore looks for the option's name in torch's
    library, without an import of torch.
    Source: pytorch pull 161035
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        library = Path(spec.origin).with_name("lib") / "libc10_cuda.so"
        return b"per_process_memory_fraction" in library.read_bytes()
    except OSError:
        return False
