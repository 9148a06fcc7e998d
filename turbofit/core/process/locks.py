"""A lock on a file, waited for no longer than two seconds."""

from __future__ import annotations

import time
from typing import Final

#: A process writes a small file under the lock, which takes less, unless somebody stops it.
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
