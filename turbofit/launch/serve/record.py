"""The run's record: ``run.json`` in the run's folder, whole after every change."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from turbofit.core.errors import LaunchError, UsageError
from turbofit.core.plan import Limits, Settings
from turbofit.core.process.files import write_atomic
from turbofit.core.run_report import RUN_SCHEMA, RunAttempt, RunEvent, RunReport
from turbofit.core.struct import to_json
from turbofit.core.version import __version__
from turbofit.launch.engine.kernel import start_time

if TYPE_CHECKING:
    from pathlib import Path

    from turbofit.core.json_types import Options
    from turbofit.core.plan import Plan

__all__ = ["AttemptRecord", "Record", "RunRecord", "facts_of", "run_folder", "state_folder"]

_MOST_EVENTS = 1000
_HINT = "set XDG_STATE_HOME to a folder that can be written"


class AttemptRecord(RunAttempt):
    """One start, with what it was started with: ``by_group`` where cards are unequal."""

    settings: Settings | None = None
    by_group: tuple[Settings, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    limits: Limits | None = None
    forecast: tuple[dict[str, int], ...] = ()
    ended_at: str | None = None

    @property
    def requests_at_once(self) -> int:
        """Requests that all its engines run at once; 0 where nobody knows."""
        if self.settings is None:
            return 0
        each = [one.max_batch_size for one in self.by_group] or [self.settings.max_batch_size]
        engines = max(len(self.groups), 1)
        return sum(each) if len(each) == engines else each[0] * engines


class RunRecord(RunReport):
    """All of ``run.json``.

    ``pid_started`` tells the process from a later one of the same number: ticks since boot, 0 where
    the system does not say.
    """

    pid: int
    pid_started: int = 0
    attempts: tuple[AttemptRecord, ...] = ()
    calibrates: bool = False


class Record:
    """What happened, as a document; the facts are of the whole run, as `RunRecord` calls them."""

    def __init__(self, folder: Path, **facts: Any) -> None:
        self.folder, self._path = folder, folder / "run.json"
        #: The supervisor writes, and the thread that watches the GPUs.
        self._lock = threading.RLock()
        #: The disk did not take it as it is now: `keep` it again.
        self.unwritten = False
        self.run = RunRecord(
            schema=RUN_SCHEMA,
            turbofit_version=__version__,
            pid=os.getpid(),
            pid_started=start_time(os.getpid()),
            started=_now(),
            state="starting",
            **facts,
        )
        self.keep()

    def begin(self, **facts: Any) -> None:
        """A new start with its own settings."""
        attempt = AttemptRecord(started=_now(), **facts)
        with self._lock:
            self._change(attempts=(*self.run.attempts, attempt))

    def attempt(self, **facts: Any) -> None:
        """More of the current attempt; nothing before the first."""
        with self._lock:
            if self.run.attempts:
                *before, last = self.run.attempts
                self._change(attempts=(*before, replace(last, **facts)))

    def event(self, kind: str, text: str) -> None:
        """Something that happened; the last thousand are kept."""
        with self._lock:
            events = (*self.run.events, RunEvent(at=_now(), kind=kind, text=text))
            self._change(events=events[-_MOST_EVENTS:])

    def state(self, state: str, **facts: Any) -> None:
        """Where the run stands."""
        self._change(state=state, **facts)

    def _change(self, **facts: Any) -> None:
        with self._lock:
            self.run = replace(self.run, **facts)
            self.keep()

    def keep(self) -> None:
        """Write it; a full disk costs the record, never the server."""
        with self._lock:
            try:
                write_atomic(self._path, to_json(self.run), mode=0o600)
            except (UsageError, OSError):
                self.unwritten = True
            else:
                self.unwritten = False


def facts_of(plan: Plan) -> Options:
    """What a start's record has of its plan."""
    return {
        "settings": plan.settings,
        "by_group": tuple(group.settings for group in plan.by_group),
        "groups": plan.parallel.groups,
        "limits": plan.limits,
        "forecast": tuple(
            {
                "gpu": gpu.index, "steady": gpu.steady, "peak": gpu.peak,
                "load_peak": gpu.load_peak, "headroom": gpu.headroom, "margin": gpu.margin,
            }
            for gpu in plan.gpus
        ),
    }  # fmt: skip


def state_folder(room: str, name: str) -> Path:
    """A new folder in a room of the state folder, named after a model.

    Raises:
        LaunchError: it cannot be made.
    """
    from turbofit.core.process.state import new_folder

    try:
        return new_folder(room, "".join(c if c.isalnum() else "-" for c in name))
    except OSError as exc:
        raise LaunchError(
            f"the state folder cannot be written: {exc.strerror or exc}", hint=_HINT
        ) from None


def run_folder(plan: Plan) -> Path:
    """A folder of the state folder for this run, with its plan.

    Raises:
        LaunchError: it cannot be made.
    """
    folder = state_folder("runs", plan.model.name)
    try:
        write_atomic(folder / "plan.json", plan.to_json())
    except UsageError as exc:
        raise LaunchError(exc.message, hint=_HINT) from None
    return folder


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
