"""A folder in memory for targets that read files, and turbofit's state folder in it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

__all__ = ["scratch", "state_in"]


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    memory = "/dev/shm"
    return tempfile.TemporaryDirectory(
        prefix="turbofit-fuzz-", dir=memory if os.access(memory, os.W_OK) else None
    )


def scratch(name: str) -> Path:
    """A folder of this process by this name; it is gone when the process ends."""
    path = Path(_folder().name) / name
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def state_in(folder: Path) -> Iterator[Path]:
    """turbofit's state folder is this one meanwhile."""
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(folder)
    try:
        yield folder / "turbofit"
    finally:
        if before is None:
            del os.environ["XDG_STATE_HOME"]
        else:
            os.environ["XDG_STATE_HOME"] = before
