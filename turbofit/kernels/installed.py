"""The census of the engine that is installed in this interpreter's environment."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.process.files import state_dir, write_atomic
from turbofit.core.process.log import LazyLogger
from turbofit.core.struct import decode, to_json
from turbofit.kernels.census import Census, Version, is_released, released, take_census

_LOG: Final = LazyLogger(__name__)
_LIBRARY: Final = re.compile(r"_turbomind\.[\w.-]*so$")


class _Engine(NamedTuple):
    """The installed LMDeploy, as its record says: the library, and the SHA-256 of the wheel's."""

    version: Version | None
    library: Path | None = None
    digest: str | None = None


def _engine() -> _Engine:
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
    """The census of the installed TurboMind; None where there is none, or its kernels are unread.

    A released wheel's is known. Another library is read once, and its census kept by its SHA-256.
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
    """Where the installed TurboMind's library is; None where there is none."""
    return _engine().library


def census_of(library: Path) -> Census:
    """The census of a library, read once (see `take_census`): kept under its SHA-256."""
    import hashlib  # it loads OpenSSL

    with library.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 24):
            digest.update(block)
    kept = state_dir("kernels", make=False) / f"{digest.hexdigest()}.json"
    if kept.is_file():
        try:
            return decode(kept.read_bytes(), Census, what=f"census {kept.name}")
        except (OSError, TurbofitError) as exc:
            _LOG.info("%s is read anew: %s", library.name, exc)
    census = take_census(library)
    try:
        state_dir("kernels")
        write_atomic(kept, to_json(census))
    except (OSError, UsageError) as exc:  # which costs another reading
        _LOG.info("%s is not kept: %s", kept.name, exc)
    return census


@cache
def torch_takes_a_share() -> bool:
    """Whether the installed torch's allocator can be held to a share of a card by its environment.

    torch ends at an option that it does not know, so its library is asked for the word.
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
