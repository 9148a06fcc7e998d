"""Runs a command, and returns its output."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def output_of(
    words: Sequence[str], seconds: float, env: Mapping[str, str] | None = None
) -> bytes | None:
    """Return a command's output; None if the command does not start, fails, or takes too long."""
    try:
        return subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=True,
            env=None if env is None else dict(env),
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
