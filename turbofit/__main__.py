"""Starts ``turbofit`` and ``python -m turbofit``; Ctrl-C during imports ends it silently."""

from __future__ import annotations

import signal
import sys
from typing import Final

#: A shell's exit code for an end by SIGINT.
_INTERRUPTED: Final = 128 + signal.SIGINT


def entry() -> None:
    """Run the console script."""
    try:
        from turbofit.cli.main import entry as run

        run()
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    entry()
