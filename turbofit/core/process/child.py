"""Child processes: one that dies with this process, and one that only answers."""

from __future__ import annotations

import subprocess
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def child(
    words: Sequence[str],
    env: Mapping[str, str] | None = None,
    *,
    stdin: int = subprocess.DEVNULL,
    stderr: int | IO[bytes] = subprocess.STDOUT,
    outlives: bool = False,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start a command, with its output in a pipe, in a process group that Ctrl-C does not reach.

    The kernel kills it, with all that it started, when the thread that calls this ends, unless it
    ``outlives`` us: call it in the main thread.

    Raises:
        OSError: it cannot be started.
    """
    from turbofit.core.process.guard import guarded  # a plan that asks for an output needs none

    return subprocess.Popen(
        list(words) if outlives else guarded(words),
        env=None if env is None else dict(env),
        stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True, cwd=cwd,
    )  # fmt: skip


def output_of(
    words: Sequence[str], seconds: float, env: Mapping[str, str] | None = None
) -> bytes | None:
    """What a command prints; None if it cannot be started, fails, or takes more ``seconds``."""
    try:
        return subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=True,
            env=None if env is None else dict(env),
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
