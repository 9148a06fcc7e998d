"""``turbofit watch``, ``ps``, ``logs``, ``stop``: servers that run, live, their logs, their end."""

from __future__ import annotations

import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

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
    from collections.abc import Callable, Mapping, Sequence

    from turbofit.observe.live import LiveServer
    from turbofit.report.painters.document import Block
    from turbofit.report.stored_documents import StoredPlan

#: States of a run that has ended.
_OVER: Final = ("ended", "failed")
#: To the terminal's first cell, and nothing below what is painted.
_HOME: Final = "\x1b[H"
_BELOW: Final = "\x1b[J"
_LINE_END: Final = "\x1b[K\n"


class RunsOptions(Validated):
    """How often `watch` looks, and how long `stop` waits."""

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
    """Look until Ctrl-C or the run's end; one look where stdout is no terminal."""
    if forget is not None:
        return _forget(forget, form)
    interval = filled(RunsOptions, given).interval
    if run is not None and "://" in run:
        raise UsageError(f"{run} is an address, not a run", hint=f"turbofit watch --url {run}")
    live = sys.stdout.isatty() and not (once or form.as_json or form.md)
    places = _newest_server() if not run else lambda: [run]
    looks = _Looks(places, url, api_key, patient=live)
    seen = looks.next()
    if form.as_json:
        answer(to_json(_several(seen)))
        return 0
    if not live:
        if any(one.now for one in seen):  # rates need two looks
            time.sleep(interval)
            seen = looks.next()
        show(_blocks(seen), markdown=form.md)
        return 0
    _paint(seen)
    while not all(one.is_over for one in seen):
        time.sleep(interval)
        seen = looks.next()
        _paint(seen)
    return 0


def _paint(seen: Sequence[_Seen]) -> None:
    answer(_HOME + painted(_blocks(seen)).replace("\n", _LINE_END) + _BELOW)


class _Seen(NamedTuple):
    """One run at one look; ``before`` is what it said at the look before, and how long ago."""

    saved: StoredPlan
    now: LiveServer | None
    before: tuple[LiveServer, float] | None

    @property
    def is_over(self) -> bool:
        return self.saved.run is not None and self.saved.run.state in _OVER


class _Looks:
    """Looks at runs, again and again; ``places`` tells at each look which they are.

    ``patient``: also where a gateway is closed for a moment, between two starts.
    """

    def __init__(
        self, places: Callable[[], list[str]], url: str | None, key: str | None, *, patient: bool
    ) -> None:
        self._places, self._url, self._key, self._patient = places, url, key, patient
        #: What answered at the last look, and when that began.
        self._last: dict[str, LiveServer] = {}
        self._at = 0.0

    def next(self) -> list[_Seen]:
        from turbofit.report.stored_documents import read_run

        last, spent = self._last, time.monotonic() - self._at
        self._at, self._last = time.monotonic(), {}
        seen = []
        for place in self._places():
            saved = read_run(place)
            now = _look(saved, self._url, self._key, patient=self._patient)
            before = last.get(saved.where)
            seen.append(_Seen(saved, now, None if before is None else (before, spent)))
            if now is not None:
                self._last[saved.where] = now
        return seen


def _blocks(seen: Sequence[_Seen]) -> list[Block]:
    from turbofit.report.views.run_view import watch_view

    blocks: list[Block] = []
    for one in seen:
        plan, run = one.saved.plan, one.saved.run
        assert run is not None
        blocks += watch_view(plan, run, one.now, one.before, _used(one.saved))
    return blocks


def _newest_server() -> Callable[[], list[str]]:
    """Tells at each look the runs of the newest server: a model of several gets new ones."""
    from turbofit.launch.serve.live_runs import live_runs
    from turbofit.report.stored_documents import newest_run

    # One that runs goes before one that ended later.
    running = [run for run in live_runs() if run.record.state not in _OVER]
    if not running:
        newest = newest_run()
        return lambda: [newest]
    newest, pid = str(running[-1].folder), running[-1].record.pid
    return lambda: [str(run.folder) for run in live_runs() if run.record.pid == pid] or [newest]


def _look(
    saved: StoredPlan, url: str | None, api_key: str | None, *, patient: bool = False
) -> LiveServer | None:
    """What the gateway says; None while it is not open.

    ``patient``: also where it is closed for a moment, between two starts.
    """
    from turbofit.core.process.variables import variables
    from turbofit.observe.live import fetch_page, now_of

    assert saved.run is not None
    urls = [url] if url else list(saved.run.urls)
    if not urls or (saved.run.state != "ready" and not url):
        return None
    key, model = api_key or next(iter(variables().keys), None), saved.plan.model
    try:
        page = fetch_page(urls[0], key)
    except UsageError:
        if url or not patient:
            raise
        return None
    return now_of(page, model.hub_id or model.name)


def _used(saved: StoredPlan) -> dict[int, int]:
    from turbofit.launch.serve.gpu_monitor import used_now

    return {} if saved.run is None or saved.run.pretend else used_now(saved.plan)


def _forget(fingerprint: str, form: Form) -> int:
    from turbofit.gateway.routing.deny_file import pardon

    if not pardon(fingerprint):
        raise UsageError(
            f"no request or client {fingerprint} is refused on this machine",
            hint="the refusal names it; run this as the user who runs the server",
        )
    document = {"schema": "turbofit.watch/1", "forgotten": fingerprint}
    answer(to_json(document) if form.as_json else f"{fingerprint} is let in again\n")
    return 0


def _several(seen: Sequence[_Seen]) -> dict[str, Any]:
    documents = [_document(one.saved, one.now) for one in seen]
    if len(documents) == 1:
        return documents[0]
    return {"schema": "turbofit.watch/1", "models": documents}


def _document(saved: StoredPlan, now: LiveServer | None) -> dict[str, Any]:
    """``denied`` is what the run's gateway refuses, since engines died of it."""
    from turbofit.gateway.routing.deny_file import DenyFile, deny_path

    assert saved.run is not None
    denied = deny_path(saved.plan, saved.run.lmdeploy, pretend=saved.run.pretend)
    return {
        "schema": "turbofit.watch/1",
        "model": saved.plan.model.name,
        "state": saved.run.state,
        "pretend": saved.run.pretend,
        "defaults": saved.run.defaults,
        "now": now,
        "denied": [] if denied is None else list(DenyFile(denied).denied.values()),
        "used": {str(index): size for index, size in _used(saved).items()},
        "forecast": {
            str(gpu.index): {"steady": gpu.steady, "peak": gpu.peak, "margin": gpu.margin}
            for gpu in saved.plan.gpus
        },
    }


@command(*FORMS, only_linux=True)
def ps(*, form: Form) -> int:
    from turbofit.launch.serve.live_runs import live_runs

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
    from turbofit.launch.serve.live_runs import chosen_run, live_runs, stop_server

    wait = filled(RunsOptions, given).wait
    if all and run is not None:
        raise UsageError(f"--all and {run!r} do not go together", hint="give one of them")
    for server in live_runs() if all else [chosen_run(run)]:
        say(f"stopping {server.name} …")
        with under_way(f"waiting for {server.name} to end"):
            stop_server(server, wait)
        say(f"{server.name} has ended")
    return 0
