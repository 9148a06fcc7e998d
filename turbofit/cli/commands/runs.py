"""``turbofit ps``, ``logs`` and ``stop``: servers that run, what engines printed, the end."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from turbofit.cli.command import Argument, Option, command
from turbofit.cli.options.common_options import FORMS, RUN, filled, options_of
from turbofit.cli.terminal.output import Form, answer, note, say
from turbofit.core.errors import UsageError
from turbofit.core.process.progress import under_way
from turbofit.core.validation import SECONDS, Metavar, Validated

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turbofit.report.painters.document import Block


@command(*FORMS, only_linux=True)
def ps(*, form: Form) -> int:
    from turbofit.launch.serve.runs import live_runs

    rows = [
        {
            "run": run.name,
            "folder": str(run.folder),
            "model": run.record.model,
            "state": run.state,
            "pid": run.record.pid,
            "started": run.record.started,
            "urls": run.record.urls,
            "pretend": run.record.pretend,
        }
        for run in live_runs()
    ]
    document = {"schema": "turbofit.ps/1", "servers": rows}
    form.show(document, lambda _: [_block(rows)])
    return 0


def _block(servers: Sequence[Mapping[str, Any]]) -> Block:
    from turbofit.report.painters.document import Paragraph, table

    if not servers:
        return Paragraph("no server of this user runs here")
    rows = (
        (
            server["run"],
            server["model"],
            server["state"] + (" (pretend)" if server["pretend"] else ""),
            str(server["pid"]),
            " ".join(server["urls"]),
        )
        for server in servers
    )
    return table(
        ("run", "model", "state", "pid", "address"),
        rows,
        right=("pid",),
        wrap=("state", "address"),
        aside=("model",),  # most of it stands in the run's name
    )


_LINES = 100


@command(
    RUN,
    Option("--lines", type=int, default=_LINES, metavar="N", help=f"the last N of each ({_LINES})"),
    only_linux=True,
)
def logs(*, run: str | None, lines: int) -> int:
    """Print the last lines of each log, and where the whole is."""
    from turbofit.report.painters.terminal import clean
    from turbofit.report.stored_documents import read_run

    if lines < 1:
        raise UsageError(f"--lines {lines} shows nothing", hint="give 1 or more")
    saved = read_run(run)
    folder = Path(saved.where)
    paths = sorted(folder.glob("*.log"))
    if not paths:
        note(f"nothing is written in {folder}")
    for path in paths:
        note(f"{path}:")
        with path.open(encoding="utf-8", errors="replace") as file:
            last = deque(file, maxlen=lines)
        answer("".join(f"{clean(line.rstrip())}\n" for line in last))
    return 0


class StopOptions(Validated):
    wait: Annotated[float, Field(gt=0, le=86400), SECONDS, Metavar("SECONDS")] = 120


@command(
    Argument("run", metavar="RUN", required=False),
    Option("--all", is_flag=True),
    *options_of(StopOptions, ["wait"]),
    only_linux=True,
)
def stop(*, run: str | None, all: bool, **given: object) -> int:  # noqa: A002 - the option's name
    from turbofit.launch.serve.runs import chosen_run, live_runs, stop_server

    options = filled(StopOptions, given)
    if all and run is not None:
        raise UsageError(f"--all and {run!r} do not go together", hint="give one of them")
    for server in live_runs() if all else [chosen_run(run)]:
        say(f"stopping {server.name} …")
        with under_way(f"waiting for {server.name} to end"):
            stop_server(server, options.wait)
        say(f"{server.name} has ended")
    return 0
