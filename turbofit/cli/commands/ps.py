"""``turbofit ps``, ``logs``, ``stop``, ``cluster``: running servers, and how they end."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Annotated

import click
from pydantic import Field

from turbofit.cli.command import Argument, Option, command
from turbofit.cli.options.common_options import FORMS, RUN
from turbofit.cli.options.field_options import filled, options_of
from turbofit.cli.terminal.output import Form, answer, note, say
from turbofit.core.errors import UsageError
from turbofit.core.process.progress import under_way
from turbofit.core.validation import SECONDS, Metavar, Validated
from turbofit.serving.process.child import child

_LINES = 100


@command(*FORMS, only_linux=True)
def ps(*, form: Form) -> int:
    """Show the running servers of this user on this machine."""
    from turbofit.report.views.run_view import servers_view
    from turbofit.serving.runs import live_runs

    rows = [
        {
            "run": run.name,
            "folder": str(run.folder),
            "model": run.record.model,
            "command": run.record.command,
            "state": run.state,
            "pid": run.record.pid,
            "started": run.record.started,
            "urls": run.record.urls,
            "pretend": run.record.pretend,
        }
        for run in live_runs()
    ]
    form.show({"schema": "turbofit.ps/1", "servers": rows}, servers_view)
    return 0


@command(
    RUN,
    Option(
        "--lines",
        type=click.IntRange(1),
        default=_LINES,
        metavar="N",
        help=f"the last N of each ({_LINES})",
    ),
    Option("--follow", "-f", is_flag=True),
    only_linux=True,
)
def logs(*, run: str | None, lines: int, follow: bool) -> int:
    """Print the last lines of a run's logs; with ``--follow``, until its server ends."""
    from turbofit.report.painters.terminal import clean
    from turbofit.report.stored_documents import read_run
    from turbofit.serving.runs import live_runs

    saved = read_run(run)
    folder = Path(saved.where)
    paths = sorted(folder.glob("*.log"))
    if not paths:
        note(f"{folder} has no logs")
    live = [one for one in live_runs() if one.folder == folder] if follow else []
    if live:
        until = f"--pid={live[0].record.pid}"  # tail ends with the server
        tail = child(["tail", "-v", "-n", f"{lines}", "-F", until, *map(str, paths)])
        for line in tail.stdout or ():
            answer(f"{clean(line.decode(errors='replace').rstrip())}\n")
        return 0
    for path in paths:
        note(f"{path}:")
        with path.open(encoding="utf-8", errors="replace") as file:
            last = deque(file, maxlen=lines)
        answer("".join(f"{clean(line.rstrip())}\n" for line in last))
    return 0


class StopOptions(Validated):
    """How long `stop` waits."""

    wait: Annotated[float, Field(gt=0, le=86400), SECONDS, Metavar("SECONDS")] = 120


@command(
    Argument("run", metavar="RUN", required=False),
    Option("--all", is_flag=True),
    *options_of(StopOptions),
    only_linux=True,
)
def stop(*, run: str | None, all: bool, **given: object) -> int:  # noqa: A002 - the option's name
    """End one server, or all of this user's on this machine, and wait until it has ended."""
    from turbofit.serving.runs import chosen_run, live_runs, stop_server

    wait = filled(StopOptions, given).wait
    if all and run is not None:
        raise UsageError(f"--all and {run!r} do not go together", hint="give one of them")
    for server in live_runs() if all else [chosen_run(run)]:
        say(f"stopping {server.name} …")
        with under_way(f"waiting for {server.name} to end"):
            stop_server(server, wait)
        say(f"{server.name} has ended")
    return 0


@command(
    Argument("action", metavar="ACTION", type=click.Choice(("status", "drain"))),
    Argument("node", metavar="NODE", required=False),
    Option("--cluster", metavar="RAY", default="ray"),
    Option("--name"),
    *FORMS,
    only_linux=True,
    usage="status|drain [NODE] [--cluster ray:ADDRESS]",
)
def cluster(*, action: str, node: str | None, cluster: str, name: str | None, form: Form) -> int:
    """Show the nodes of what a Ray cluster serves, or let one node finish its requests and end."""
    from turbofit.report.views.cluster_view import status_view
    from turbofit.serving.cluster.actors import drain, statuses
    from turbofit.serving.cluster.ray_adapter import connected
    from turbofit.serving.options import ray_address

    if (node is not None) != (action == "drain"):
        raise UsageError(
            "drain needs a node, and status takes no node", hint="turbofit cluster drain NODE"
        )
    with connected(ray_address(cluster)):
        if node is None:
            form.show(statuses(name), status_view)
        else:
            drained = drain(name, node)
            form.tell({"drained": drained.id}, f"node {drained.name} finishes what it has\n")
    return 0
