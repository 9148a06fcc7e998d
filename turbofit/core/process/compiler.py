"""The C compiler of this machine, if it has one, and the folder of the compiled files."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def find_compiler() -> list[str] | None:
    """The command of a C compiler, ``CC`` first; None if the machine has none."""
    chosen = os.environ.get("CC", "").split()
    if chosen and shutil.which(chosen[0]):
        return chosen
    paths = filter(None, map(shutil.which, ("cc", "gcc", "clang")))
    return [path] if (path := next(paths, None)) else None


def cache_folder(room: str) -> Path:
    """The folder for a room's compiled files; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "turbofit" / room


def compile_c(words: Sequence[str]) -> str | None:
    """Run a compiler; returns None if it succeeds, else its first line with an error.

    If there is no such line, all of its stderr is returned, which may be empty.

    Raises:
        OSError: the compiler cannot be started.
    """
    import subprocess

    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if not done.returncode:
        return None
    lines = done.stderr.splitlines()
    return next((line for line in lines if "error" in line), done.stderr).strip()


def make_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder with ``fill``, complete or not at all, even if others make it meanwhile.

    Raises:
        OSError: it cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="building-", dir=target.parent))
    try:
        fill(temporary)
        try:
            temporary.rename(target)
        except OSError:  # another process was faster
            if not target.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
