"""``turbofit logs [RUN]``: what the engines of a run have printed."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

from turbofit.cli.command import PATH, Argument, Option, command

_LINES = 100


@command(
    Argument(
        "run", metavar="RUN", required=False, type=PATH,
        explained="a run's folder or name, or its model (default: the newest run)",
    ),
    Option("--lines", type=int, default=_LINES, metavar="N", help=f"the last N of each ({_LINES})"),
    only_linux=True,
)  # fmt: skip
def logs(*, run: str | None, lines: int) -> int:
    """Print the last lines of each log, and where the whole is."""
    from turbofit.cli.terminal.output import answer, note
    from turbofit.core.errors import UsageError
    from turbofit.launch.serve.runs import newest_run_of
    from turbofit.report.painters.terminal import clean
    from turbofit.report.stored_documents import newest_run, read_saved

    if lines < 1:
        raise UsageError(f"--lines {lines} shows nothing", hint="give 1 or more")
    found_run = newest_run_of(run) if run else None
    if run and found_run is None and not _is_there(run):
        raise UsageError(f"no run is called {run!r}", hint="turbofit ps lists runs")
    saved = read_saved(str(found_run or run or newest_run()))
    if saved.run is None:
        raise UsageError(f"{run} is a plan, not a run", hint="turbofit ps lists runs")
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


def _is_there(name: str) -> bool:
    """Whether a name is one that `report` reads: a path, a run's name, or the newest."""
    from turbofit.core.process.state import state_dir
    from turbofit.report.stored_documents import LATEST

    places = name, state_dir("runs", make=False) / name
    return name in (LATEST, "-") or any(os.path.exists(place) for place in places)
