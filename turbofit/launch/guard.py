"""Runs a command that the kernel kills when turbofit dies, however it dies.

``python guard.py PARENT COMMAND…``: sets the parent-death signal and becomes the command. It is a
file of its own, without imports of turbofit, since code between fork and exec of a process with
threads could lock up. The signal is bound to the thread that started us, which must be turbofit's
main thread.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the command, unless the parent is gone already."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as exc:
        sys.exit(f"{command[0]}: {exc.strerror}")


if __name__ == "__main__":
    main()
