"""The LMDeploy in turbofit's environment: its version, and the words that start LMDeploy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final, NamedTuple

from turbofit.core.errors import PackageError
from turbofit.core.installation import install_command, installed, without_gpu
from turbofit.core.process.log import LazyLogger
from turbofit.core.version import REFERENCE
from turbofit.memory.engines import LMDEPLOY
from turbofit.memory.versions import OLDEST_SERVED, release

_LOG: Final = LazyLogger(__name__)
#: The program that becomes LMDeploy's command line.
ENTRY: Final = str(Path(__file__).with_name("entry.py"))


class Lmdeploy(NamedTuple):
    """The LMDeploy of a launch: its version, and the words that start LMDeploy."""

    version: str
    argv: tuple[str, ...]

    @property
    def warning(self) -> str | None:
        """A warning if plans are made for another version of LMDeploy; None otherwise."""
        actual, planned = release(self.version), release(REFERENCE)
        if actual == planned:
            return None
        how = "newer" if actual > planned else "older"
        return f"LMDeploy {self.version} is {how} than {REFERENCE}, for which plans are made"


def find_lmdeploy() -> Lmdeploy:
    """Find the LMDeploy of this interpreter, without an import.

    Raises:
        PackageError: LMDeploy is missing or too old.
    """
    version = installed("lmdeploy")
    if version is None:
        raise PackageError(
            "LMDeploy is not installed beside turbofit",
            hint=f"install it with {install_command('lmdeploy')}, or turbofit where LMDeploy is"
            f"{without_gpu()}",
        )
    _LOG.info("LMDeploy %s", version)
    if release(version) < OLDEST_SERVED:
        oldest = ".".join(map(str, OLDEST_SERVED))
        raise PackageError(
            f"LMDeploy {version} is too old: serve needs {oldest} or newer",
            hint=f"install a newer one with {install_command('lmdeploy', upgrade=True)}",
        )
    return Lmdeploy(version, module_runner("lmdeploy"))


def lmdeploy_if_needed(engine: str | None) -> Lmdeploy:
    """Find LMDeploy; return an empty ``argv`` if LMDeploy is missing and may not be needed.

    Raises:
        PackageError: LMDeploy is missing or too old, and ``engine`` is one of its engines.
    """
    try:
        return find_lmdeploy()
    except PackageError:
        if engine in LMDEPLOY:
            raise
        return Lmdeploy(REFERENCE, ())


def module_runner(module: str) -> tuple[str, ...]:
    return sys.executable, ENTRY, module
