"""``turbofit watch``, ``ps``, ``logs``, ``stop``: running servers, their logs, their end."""

from __future__ import annotations

import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import Field

from turbofit.cli.command import PATH, Argument, Option, command
from turbofit.cli.options.common_options import FORMS, RUN
from turbofit.cli.options.field_options import filled, options_of
from turbofit.cli.terminal.output import Form, answer, note, painted, say, show
from turbofit.core.errors import UsageError
from turbofit.core.process.progress import under_way
from turbofit.core.struct import to_json
from turbofit.core.validation import SECONDS, Metavar, Validated

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.report.painters.document import Block

#: Terminal codes: go to the first cell, clear below, clear the rest of a line.
_HOME: Final = "\x1b[H"
_BELOW: Final = "\x1b[J"
_LINE_END: Final = "\x1b[K\n"


class RunsOptions(Validated):
    """How often `watch` looks, and how long `stop` waits, in seconds."""

    interval: Annotated[float, Field(ge=0.2, lt=1e6), SECONDS, Metavar("SECONDS")] = 2.0
    wait: Annotated[float, Field(gt=0, le=86400), SECONDS, Metavar("SECONDS")] = 120


@command(
    Argument("run", metavar="RUN", required=False, type=PATH),
    Option("--url"),
    Option("--api-key", metavar="KEY"),
    *options_of(RunsOptions, ["interval"]),
    Option("--forget", metavar="FINGERPRINT"),
    Option("--once", is_flag=True),
    *FORMS,
)
def watch(
    *,
    run: str | None,
    url: str | None,
    api_key: str | None,
    forget: str | None,
    once: bool,
    form: Form,
    **given: object,
) -> int:
    """Look until Ctrl-C or the run's end; look once if stdout is no terminal."""
    if forget is not None:
        return _forget(forget, form)
    from turbofit.report.watched import Looks, newest_server, watch_blocks, watch_document

    interval = filled(RunsOptions, given).interval
    if run is not None and "://" in run:
        raise UsageError(f"{run} is an address, not a run", hint=f"turbofit watch --url {run}")
    live = sys.stdout.isatty() and not (once or form.as_json or form.md)
    places = newest_server() if not run else lambda: [run]
    looks = Looks(places, url, api_key, patient=live)
    seen = looks.next()
    if form.as_json:
        answer(to_json(watch_document(seen)))
        return 0
    if not live:
        if any(one.now for one in seen):  # rates need two looks
            time.sleep(interval)
            seen = looks.next()
        show(watch_blocks(seen), markdown=form.md)
        return 0
    _paint(watch_blocks(seen))
    while not all(one.is_over for one in seen):
        time.sleep(interval)
        seen = looks.next()
        _paint(watch_blocks(seen))
    return 0


def _paint(blocks: Sequence[Block]) -> None:
    answer(_HOME + painted(blocks).replace("\n", _LINE_END) + _BELOW)


def _forget(fingerprint: str, form: Form) -> int:
    from turbofit.gateway.routing.deny_file import pardon

    if not pardon(fingerprint):
        raise UsageError(
            f"no request or client {fingerprint} is refused on this machine",
            hint="the refusal names it; run this as the user who runs the server",
        )
    document = {"schema": "turbofit.watch/1", "forgotten": fingerprint}
    form.tell(document, f"{fingerprint} is let in again\n")
    return 0


@command(*FORMS, only_linux=True)
def ps(*, form: Form) -> int:
    from turbofit.report.views.run_view import servers_view
    from turbofit.report.watched import servers_document

    form.show(servers_document(), servers_view)
    return 0


_LINES = 100


@command(
    RUN,
    Option("--lines", type=int, default=_LINES, metavar="N", help=f"the last N of each ({_LINES})"),
    only_linux=True,
)
def logs(*, run: str | None, lines: int) -> int:
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


@command(
    Argument("run", metavar="RUN", required=False),
    Option("--all", is_flag=True),
    *options_of(RunsOptions, ["wait"]),
    only_linux=True,
)
def stop(*, run: str | None, all: bool, **given: object) -> int:  # noqa: A002 - the option's name
    from turbofit.launch.serve.runs import chosen_run, live_runs, stop_server

    wait = filled(RunsOptions, given).wait
    if all and run is not None:
        raise UsageError(f"--all and {run!r} do not go together", hint="give one of them")
    for server in live_runs() if all else [chosen_run(run)]:
        say(f"stopping {server.name} …")
        with under_way(f"waiting for {server.name} to end"):
            stop_server(server, wait)
        say(f"{server.name} has ended")
    return 0
