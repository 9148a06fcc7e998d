"""Locks of files that no process waits for without end."""

from __future__ import annotations

import time
from typing import Final

__all__ = ["lock_soon"]

#: Whoever is not stopped in the middle of it has written its file by then.
_SECONDS: Final = 2.0
_PAUSE: Final = 0.02


def lock_soon(descriptor: int) -> None:
    """Lock an open file against other processes, within two seconds.

    The lock ends when the descriptor is closed. Windows has none: there is no server there.

    Raises:
        TimeoutError: somebody else keeps it, such as a process that was stopped.
        OSError: the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        return
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError(0, "another process keeps its lock") from None
        else:
            return
        time.sleep(_PAUSE)
