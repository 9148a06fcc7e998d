"""Which Python a command runs, and whether its torch is a CUDA build."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from turbofit.core.errors import UsageError
from turbofit.pretend.environment import cuda_site

__all__ = ["site_of"]

_PYTHON: Final = re.compile(r"(python|pypy)[\d.]*$")
_SECONDS: Final = 30.0
_ASK: Final = "from importlib.util import find_spec as f; print((f('torch') or f('os')).origin)"


def site_of(command: Sequence[str], python: str | None = None) -> Path | None:
    """The folder of packages whose CUDA libraries a command will load; None where there are none.

    A Python and a script that names one in its first line are asked; of anything else (a shell
    script, a compiled program) it is taken that it runs this Python's packages.

    Args:
        command: program and arguments.
        python: the Python that counts, whatever the command is.

    Raises:
        UsageError: ``python`` is none that can be run.
    """
    if python is not None and shutil.which(python) is None:
        raise UsageError(f"no Python at {python}", hint="--python takes a Python's path or name")
    python = python or _interpreter(command[0])
    if python is None:
        return cuda_site()
    try:
        answer = subprocess.run(
            [python, "-c", _ASK], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return cuda_site()
    folder = Path(answer.stdout.strip() or "/nonexistent").parent
    return folder.parent if (folder / "lib" / "libtorch_cuda.so").exists() else None


def _interpreter(program: str) -> str | None:
    found = shutil.which(program)
    if found is None:
        return None
    if _PYTHON.match(Path(found).name):
        return found
    try:
        with open(found, "rb") as file:
            first = file.readline(512)
    except OSError:
        return None
    pieces = first[2:].decode("utf-8", "replace").split() if first.startswith(b"#!") else []
    named = next((word for word in pieces if _PYTHON.match(Path(word).name)), None)
    return shutil.which(named) if named else None
