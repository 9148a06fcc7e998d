"""Servers that run, at repeated looks: their records, their live figures, and the document."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.core.errors import UsageError
from turbofit.core.process.variables import variables
from turbofit.gateway.routing.deny_file import DenyFile, deny_path
from turbofit.launch.serve.gpu_monitor import used_now
from turbofit.launch.serve.runs import live_runs
from turbofit.observe.live import LiveServer, fetch_page, now_of
from turbofit.report.stored_documents import StoredPlan, newest_run, read_run
from turbofit.report.views.run_view import watch_view

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.core.json_types import Document
    from turbofit.report.painters.document import Block

#: States of a run that has ended.
_OVER: Final = ("ended", "failed")


class Seen(NamedTuple):
    """One run at one look; ``before`` is the figures of the look before, and its age in seconds."""

    saved: StoredPlan
    now: LiveServer | None
    before: tuple[LiveServer, float] | None

    @property
    def is_over(self) -> bool:
        return self.saved.run is not None and self.saved.run.state in _OVER


class Looks:
    """Repeated looks at runs; ``places`` returns the runs at each look.

    ``patient`` accepts that a gateway is closed for a moment, between two starts.
    """

    def __init__(
        self, places: Callable[[], list[str]], url: str | None, key: str | None, *, patient: bool
    ) -> None:
        self._places, self._url, self._key, self._patient = places, url, key, patient
        #: The figures of the last look, and the time when that look began.
        self._last: dict[str, LiveServer] = {}
        self._at = 0.0

    def next(self) -> list[Seen]:
        last, spent = self._last, time.monotonic() - self._at
        self._at, self._last = time.monotonic(), {}
        seen = []
        for place in self._places():
            saved = read_run(place)
            now = _look(saved, self._url, self._key, patient=self._patient)
            before = last.get(saved.where)
            seen.append(Seen(saved, now, None if before is None else (before, spent)))
            if now is not None:
                self._last[saved.where] = now
        return seen


def watch_blocks(seen: Sequence[Seen]) -> list[Block]:
    blocks: list[Block] = []
    for one in seen:
        plan, run = one.saved.plan, one.saved.run
        assert run is not None
        blocks += watch_view(plan, run, one.now, one.before, _used(one.saved))
    return blocks


def newest_server() -> Callable[[], list[str]]:
    """Return a function that lists the newest server's runs; a model of several gets new runs."""
    # A server that runs takes precedence over one that ended later.
    running = [run for run in live_runs() if run.record.state not in _OVER]
    if not running:
        newest = newest_run()
        return lambda: [newest]
    newest, pid = str(running[-1].folder), running[-1].record.pid
    return lambda: [str(run.folder) for run in live_runs() if run.record.pid == pid] or [newest]


def _look(
    saved: StoredPlan, url: str | None, api_key: str | None, *, patient: bool = False
) -> LiveServer | None:
    """The live figures of the gateway; None while it is not open.

    ``patient`` returns None, not an error, for a gateway closed between two starts.
    """
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
    return {} if saved.run is None or saved.run.pretend else used_now(saved.plan)


def watch_document(seen: Sequence[Seen]) -> Document:
    documents = [_document(one.saved, one.now) for one in seen]
    if len(documents) == 1:
        return documents[0]
    return {"schema": "turbofit.watch/1", "models": documents}


def _document(saved: StoredPlan, now: LiveServer | None) -> Document:
    """The document of one run; ``denied`` lists the requests that its gateway now refuses."""
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


def servers_document() -> Document:
    """The running servers of this user on this machine."""
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
    return {"schema": "turbofit.ps/1", "servers": rows}
