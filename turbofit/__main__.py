"""``turbofit``, and ``python -m turbofit``: Ctrl-C while it imports ends it without a word."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, Final

#: A shell's code for an end by SIGINT.
_INTERRUPTED: Final = 128 + signal.SIGINT


def entry() -> None:
    """The console script."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # else a shell, or nohup, lets it be ignored
        signal.signal(signal.SIGINT, _end)
    try:
        from turbofit.cli.main import entry as run

        signal.signal(signal.SIGINT, usual)
        run()
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _end(*_: Any) -> None:
    """Nothing has begun: no import that is under way need hear of it."""
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    entry()
