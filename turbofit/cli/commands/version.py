"""``turbofit version``."""

from __future__ import annotations

import turbofit
from turbofit.cli.command import command
from turbofit.cli.terminal.output import answer


@command()
def version() -> int:
    answer(f"turbofit {turbofit.__version__}\n")
    return 0
