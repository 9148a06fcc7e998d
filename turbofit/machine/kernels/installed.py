"""The census of the TurboMind that this interpreter's environment has installed."""

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
from turbofit.machine.kernels.census import Census, Version, is_released, released, take_census

_LOG: Final = LazyLogger(__name__)
_LIBRARY: Final = re.compile(r"_turbomind\.[\w.-]*so$")


class _Engine(NamedTuple):
    """The installed LMDeploy by its ``RECORD``: version, library, and the library's SHA-256."""

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
    """The census of the installed TurboMind; None if there is none, or it cannot be read.

    The census of a released wheel is known. Another library is read once, and its census stored.
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
    """The path of the installed TurboMind's library; None if there is none."""
    return _engine().library


def census_of(library: Path) -> Census:
    """The census of a library, read once (see `take_census`) and stored under its SHA-256."""
    import hashlib  # its import loads OpenSSL

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
    except (OSError, UsageError) as exc:  # the next call must read the library again
        _LOG.info("%s is not kept: %s", kept.name, exc)
    return census


@cache
def torch_takes_a_share() -> bool:
    """Whether the environment can limit the allocator of the installed torch to a share of a card.

    torch aborts on an unknown option, so this looks for the option's name in torch's library.
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
