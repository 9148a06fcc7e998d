"""The census of the engine that is installed in this interpreter's environment."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import TurbofitError
from turbofit.core.files import write_atomic
from turbofit.core.log import LazyLogger
from turbofit.core.state import state_dir
from turbofit.core.struct import decode, to_json
from turbofit.kernels.census import Census, empty_kernels, take_census
from turbofit.kernels.released import Version, is_released, released

if TYPE_CHECKING:
    from importlib.metadata import Distribution

__all__ = ["census_of", "empty_kernels_file", "installed", "turbomind_library"]

_LOG: Final = LazyLogger(__name__)
_LIBRARY: Final = re.compile(r"_turbomind\.[\w.-]*so$")


@cache
def installed() -> Census | None:
    """The census of the installed TurboMind; None where there is none, or its kernels are unread.

    A released wheel's is known. Another library is read once, and its census kept by its SHA-256.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        found = distribution("lmdeploy")
    except PackageNotFoundError:
        return None
    version = _version(found.version)
    digest = _recorded(found)
    if version is not None and digest is not None and is_released(version, digest):
        return released(version)
    library = turbomind_library(found)
    if library is None:
        return None
    try:
        return census_of(library)
    except (OSError, ValueError, TurbofitError) as exc:
        _LOG.info("the kernels of %s are not read: %s", library.name, exc)
        return None if version is None else released(version)


def turbomind_library(lmdeploy: Distribution | None = None) -> Path | None:
    """Where the installed TurboMind's library is; None where there is none."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        found = lmdeploy or distribution("lmdeploy")
    except PackageNotFoundError:
        return None
    for file in found.files or ():
        if _LIBRARY.search(file.name):
            path = Path(str(file.locate()))
            return path if path.is_file() else None
    return None


def census_of(library: Path) -> Census:
    """The census of a library, read once: kept under its SHA-256.

    Raises:
        As :func:`take_census`.
    """
    import hashlib  # it loads OpenSSL

    with library.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 24):
            digest.update(block)
    kept = state_dir("kernels") / f"{digest.hexdigest()}.json"
    if kept.is_file():
        try:
            return decode(kept.read_bytes(), Census, what=f"census {kept.name}")
        except TurbofitError:
            _LOG.info("%s is read anew: of another turbofit", library.name)
    census = take_census(library)
    write_atomic(kept, to_json(census))
    return census


def empty_kernels_file(capability: tuple[int, int]) -> Path | None:
    """A file with the kernels of the installed TurboMind that are empty on such a card.

    One mangled name a line, in the order of their bytes. None where there is no engine, or its
    kernels cannot be read.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        found = distribution("lmdeploy")
    except PackageNotFoundError:
        return None
    library = turbomind_library(found)
    if library is None:
        return None
    digest = _recorded(found) or f"{library.stat().st_mtime_ns}"
    name = f"{digest}-{library.stat().st_size}-{capability[0]}{capability[1]}"
    kept = state_dir("kernels") / f"empty-{name}.txt"
    if not kept.is_file():
        try:
            names = empty_kernels(library, capability)
        except (OSError, ValueError, TurbofitError) as exc:
            _LOG.info("the kernels of %s are not read: %s", library.name, exc)
            return None
        write_atomic(kept, "".join(f"{one}\n" for one in sorted(names)))
    return kept


def _recorded(lmdeploy: Distribution) -> str | None:
    files = lmdeploy.files or ()
    hashes = (file.hash for file in files if _LIBRARY.search(file.name))
    return next((found.value for found in hashes if found and found.mode == "sha256"), None)


def _version(text: str) -> Version | None:
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    return None if match is None else (int(match[1]), int(match[2]), int(match[3]))
