"""The LMDeploy that is launched, and what starts a module of an interpreter."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.core.errors import PackageError
from turbofit.core.installation import install_command
from turbofit.core.process.log import LazyLogger
from turbofit.core.version import REFERENCE
from turbofit.memory.engines import LMDEPLOY
from turbofit.memory.versions import OLDEST_SERVED, release

if TYPE_CHECKING:
    from collections.abc import Sequence

_LOG: Final = LazyLogger(__name__)


class Lmdeploy(NamedTuple):
    """The LMDeploy that would be launched: its version and the words that start it.

    ``grammars``: XGrammar is there beside it, which structured output needs.
    """

    version: str
    argv: tuple[str, ...]
    grammars: bool = True

    @property
    def warning(self) -> str | None:
        """The warning about its version, where the account is for another one."""
        found, planned = release(self.version), release(REFERENCE)
        if found == planned:
            return None
        how = "newer" if found > planned else "older"
        return f"LMDeploy {self.version} is {how} than {REFERENCE}, which the plan's account is for"


def find_lmdeploy() -> Lmdeploy:
    """LMDeploy of this interpreter, else the one on PATH. It is not imported: that takes seconds.

    Raises:
        PackageError: there is none, or it is too old.
    """
    found = _of_interpreter() or _on_path()
    if found is None:
        raise PackageError(
            "LMDeploy is not installed", hint=f"install it with {install_command('lmdeploy')}"
        )
    _LOG.info("LMDeploy %s, started by %s", found.version, found.argv)
    if release(found.version) < OLDEST_SERVED:
        oldest = ".".join(map(str, OLDEST_SERVED))
        raise PackageError(
            f"LMDeploy {found.version} is older than {oldest}, which serve needs",
            hint=f"install a newer one with {install_command('lmdeploy', upgrade=True)}",
        )
    return found


def lmdeploy_if_needed(engine: str | None) -> tuple[Lmdeploy, PackageError | None]:
    """LMDeploy, or why there is none where the engine may turn out to be another one.

    Raises:
        PackageError: it is missing, and it was asked for.
    """
    try:
        return find_lmdeploy(), None
    except PackageError as exc:
        if engine in LMDEPLOY:
            raise
        return Lmdeploy(REFERENCE, ()), exc


def _of_interpreter() -> Lmdeploy | None:
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    try:
        found = version("lmdeploy")
    except PackageNotFoundError:
        return None
    grammars = find_spec("xgrammar") is not None
    return Lmdeploy(found, module_runner("lmdeploy"), grammars=grammars)


def _on_path() -> Lmdeploy | None:
    """The script's first line names its interpreter, which knows the version."""
    import shutil
    import subprocess

    script = shutil.which("lmdeploy")
    if script is None:
        return None
    try:
        with open(script, "rb") as file:
            first = os.fsdecode(file.readline(1024)).strip()
        if not first.startswith("#!"):
            return None
        interpreter = first[2:].split()
        code = (
            "import importlib.metadata as m, importlib.util as u;"
            "print(m.version('lmdeploy'), u.find_spec('xgrammar') is not None)"
        )
        out = subprocess.run(
            [*interpreter, "-c", code], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    version, _, grammars = out.stdout.strip().partition(" ")
    return Lmdeploy(version, module_runner("lmdeploy", interpreter), grammars=grammars == "True")


def module_runner(module: str, interpreter: Sequence[str] = ()) -> tuple[str, ...]:
    """Start a module's command line, by our interpreter or that of these words."""
    return (*(interpreter or (sys.executable,)), str(Path(__file__).with_name("entry.py")), module)
