"""``turbofit logs [RUN]``: what the engines of a run have printed."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from turbofit.cli.command import Option, command
from turbofit.cli.options.common_options import RUN

_LINES = 100


@command(
    RUN,
    Option("--lines", type=int, default=_LINES, metavar="N", help=f"the last N of each ({_LINES})"),
    only_linux=True,
)  # fmt: skip
def logs(*, run: str | None, lines: int) -> int:
    """Print the last lines of each log, and where the whole is."""
    from turbofit.cli.terminal.output import answer, note
    from turbofit.core.errors import UsageError
    from turbofit.report.painters.terminal import clean
    from turbofit.report.stored_documents import read_run

    if lines < 1:
        raise UsageError(f"--lines {lines} shows nothing", hint="give 1 or more")
    saved = read_run(run)
    folder = Path(saved.where)
    found = sorted(folder.glob("*.log"))
    if not found:
        note(f"nothing is written in {folder}")
    for path in found:
        note(f"{path}:")
        with path.open(encoding="utf-8", errors="replace") as file:
            last = deque(file, maxlen=lines)
        answer("".join(f"{clean(line.rstrip())}\n" for line in last))
    return 0
