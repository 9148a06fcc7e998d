"""``turbofit watch [RUN]``: a running server, live in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import Field

from turbofit.cli.command import PATH, Argument, Option, command
from turbofit.cli.options.common_options import FORMS, filled, options_of
from turbofit.cli.terminal.output import Form, answer, painted, show
from turbofit.core.errors import UsageError
from turbofit.core.struct import to_json
from turbofit.core.validation import SECONDS, Metavar, Validated

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.gateway.routing.deny_file import Denied
    from turbofit.observe.live import LiveServer
    from turbofit.report.painters.document import Block
    from turbofit.report.stored_documents import StoredPlan

#: States of a run that has ended.
_OVER: Final = ("ended", "failed")
#: To the terminal's first cell, and nothing below what is painted.
_HOME: Final = "\x1b[H"
_BELOW: Final = "\x1b[J"
_LINE_END: Final = "\x1b[K\n"


class WatchOptions(Validated):
    interval: Annotated[float, Field(ge=0.2, lt=1e6), SECONDS, Metavar("SECONDS")] = 2.0


@command(
    Argument("run", metavar="RUN", required=False, type=PATH),
    Option("--url"),
    Option("--api-key", metavar="KEY"),
    *options_of(WatchOptions),
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
    import sys
    import time

    from turbofit.report.stored_documents import read_run
    from turbofit.report.views.run_view import watch_view

    if forget is not None:
        return _forget(forget, form)
    interval = filled(WatchOptions, given).interval
    if run is not None and "://" in run:
        raise UsageError(f"{run} is an address, not a run", hint=f"turbofit watch --url {run}")
    live = sys.stdout.isatty() and not (once or form.as_json or form.md)
    named = [run] if run else []
    places = _newest_server() if not run else lambda: named
    before: dict[str, tuple[LiveServer, float]] = {}
    while True:
        began = time.monotonic()
        watched = [read_run(place) for place in places()]
        now = {saved.where: _look(saved, url, api_key, patient=live) for saved in watched}
        if not live and not form.as_json and any(now.values()):
            # Rates need two looks.
            time.sleep(interval)
            before = {place: (server, interval) for place, server in now.items() if server}
            now = {saved.where: _look(saved, url, api_key) for saved in watched}
        if form.as_json:
            documents = [_document(saved, now[saved.where]) for saved in watched]
            several = {"schema": "turbofit.watch/1", "models": documents}
            answer(to_json(several if len(documents) > 1 else documents[0]))
        else:
            blocks: list[Block] = []
            for saved in watched:
                looks = now[saved.where], before.get(saved.where)
                blocks += watch_view(saved.plan, saved.run, *looks, _used(saved))
            if live:
                answer(_HOME + painted(blocks).replace("\n", _LINE_END) + _BELOW)
            else:
                show(blocks, markdown=form.md)
        if not live or all(saved.run and saved.run.state in _OVER for saved in watched):
            return 0
        time.sleep(interval)
        spent = time.monotonic() - began
        before = {place: (server, spent) for place, server in now.items() if server}


def _newest_server() -> Callable[[], list[str]]:
    """Tells the runs of the newest server at each look: a model of several gets new ones."""
    from turbofit.launch.serve.runs import live_runs
    from turbofit.report.stored_documents import newest_run

    newest, runs = newest_run(), live_runs()
    pid = next((run.record.pid for run in runs if run.folder == Path(newest).parent), None)
    if pid is None:
        return lambda: [newest]
    return lambda: [str(run.folder) for run in live_runs() if run.record.pid == pid] or [newest]


def _look(
    saved: StoredPlan, url: str | None, api_key: str | None, *, patient: bool = False
) -> LiveServer | None:
    """What the gateway says; None while the run's own is not open.

    ``patient``: nor where it is closed for a moment, between two starts.
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


def _document(saved: StoredPlan, now: LiveServer | None) -> dict[str, Any]:
    assert saved.run is not None
    return {
        "schema": "turbofit.watch/1",
        "model": saved.plan.model.name,
        "state": saved.run.state,
        "pretend": saved.run.pretend,
        "defaults": saved.run.defaults,
        "now": now,
        "denied": _denied(saved),
        "used": {str(index): size for index, size in _used(saved).items()},
        "forecast": {
            str(gpu.index): {"steady": gpu.steady, "peak": gpu.peak, "margin": gpu.margin}
            for gpu in saved.plan.gpus
        },
    }


def _denied(saved: StoredPlan) -> list[Denied]:
    """What the run's gateway refuses, since engines died of it."""
    from turbofit.gateway.routing.deny_file import DenyFile, deny_path

    assert saved.run is not None
    name = deny_path(saved.plan, saved.run.lmdeploy, pretend=saved.run.pretend)
    return [] if name is None else list(DenyFile(Path(name)).denied.values())
