"""Starts child processes under the guard."""

from __future__ import annotations

import subprocess
from typing import IO, TYPE_CHECKING

from turbofit.serving.process.guard import guarded

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

    ``outlives``: the command may outlive this process. Otherwise the kernel kills the command and
    its descendants when the calling thread ends, so call this in the main thread.

    Raises:
        OSError: the command cannot be started.
    """
    return subprocess.Popen(
        list(words) if outlives else guarded(words),
        env=None if env is None else dict(env),
        stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True, cwd=cwd,
    )  # fmt: skip
