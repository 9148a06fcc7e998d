"""``turbofit stop [RUN]``: end a server in order."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from turbofit.cli.command import Argument, Option, command
from turbofit.cli.options.common_options import filled, options_of
from turbofit.cli.terminal.output import say
from turbofit.core.errors import UsageError
from turbofit.core.process.progress import under_way
from turbofit.core.validation import SECONDS, Metavar, Validated


class StopOptions(Validated):
    wait: Annotated[float, Field(gt=0, le=86400), SECONDS, Metavar("SECONDS")] = Field(
        default=120, description="for requests under way and the engines' end"
    )


@command(
    Argument(
        "run", metavar="RUN", required=False,
        explained="a run's name or its model's (default: the only one that runs)",
    ),
    Option("--all", is_flag=True, help="every server of this user"),
    *options_of(StopOptions, ["wait"]),
    only_linux=True,
)  # fmt: skip
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
