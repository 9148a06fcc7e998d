"""Runs a command; when turbofit dies, the kernel kills the command and its descendants.

``python guard.py PARENT COMMAND…`` sets the parent-death signal and becomes the command. The kernel
sends this signal when the thread that started this process ends, so the main thread must start the
process. A watcher in the command's process group kills the rest of the group when the command
ends: LMDeploy's PyTorch engine is a child of its server and would keep its GPU. This is a separate
program, since code between fork and exec could lock up in a process with threads. The program
imports nothing of turbofit.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence

_PR_SET_PDEATHSIG = 1


def guarded(command: Sequence[str]) -> list[str]:
    """Return the words that start a command under this guard, as a child of this process."""
    return [sys.executable, "-I", __file__, str(os.getpid()), *command]


def main() -> None:
    """Start the watcher and become the command; exit if the parent has already ended."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    # If the command shares the group of another process, the watcher would kill that process.
    engine = os.getpid()
    if os.getpgrp() == engine and os.fork() == 0:
        _watch(prctl, engine)
    try:
        os.execvp(command[0], command)
    except OSError as exc:
        sys.exit(f"{command[0]}: {exc.strerror}")


def _watch(prctl: Callable[[int, int], int], engine: int) -> None:
    """Wait until the command ends, then kill its process group, this process included."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # A reader of the command's output waits while any process has the pipe open: close it here.
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(nothing, fd)
    while os.getppid() == engine:
        signal.sigwait({signal.SIGTERM})
    with contextlib.suppress(OSError):
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main()
