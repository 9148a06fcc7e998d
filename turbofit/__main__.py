"""Starts ``turbofit`` and ``python -m turbofit``; Ctrl-C during imports ends it silently."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, Final

#: A shell's exit code for an end by SIGINT.
_INTERRUPTED: Final = 128 + signal.SIGINT


def entry() -> None:
    """Run the console script."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # else a shell, or nohup, ignores it
        signal.signal(signal.SIGINT, _end)
    try:
        from turbofit.cli.main import entry as run

        signal.signal(signal.SIGINT, usual)
        run()
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _end(*_: Any) -> None:
    """End the process immediately; during imports nothing needs an orderly end."""
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    entry()
