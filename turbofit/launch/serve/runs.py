"""What a run keeps below the state folder: its record and its plan."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from turbofit.core.errors import LaunchError, UsageError
from turbofit.core.plan import Settings
from turbofit.core.process.files import new_path, write_atomic
from turbofit.core.run_report import RUN_SCHEMA, RunAttempt, RunEvent, RunReport
from turbofit.core.struct import to_json
from turbofit.core.version import __version__
from turbofit.launch.engine.kernel import start_time

if TYPE_CHECKING:
    from pathlib import Path

    from turbofit.core.plan import Plan

_MOST_EVENTS = 1000
_HINT = "set XDG_STATE_HOME to a folder that can be written"


class AttemptRecord(RunAttempt):
    """One start; its plan is beside the record. ``requests_at_once``: 0 where nobody knows."""

    settings: Settings | None = None
    requests_at_once: int = 0


class RunRecord(RunReport):
    """All of ``run.json``; ``pid_started`` as `kernel.start_time` tells it."""

    pid: int
    pid_started: int = 0
    attempts: tuple[AttemptRecord, ...] = ()


class Record:
    """What happened in a run, as a document; the facts are fields of `RunRecord`."""

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

    @property
    def is_there(self) -> bool:
        """Whether it is on disk; a full disk that did not take it has not lost it.

        With its plan: a cleaner at work takes that again where both were just made again.
        """
        if self.unwritten:
            return self.folder.exists()
        return self._path.exists() and (self.folder / "plan.json").exists()

    def begin(self, **facts: Any) -> None:
        """A new start with its own settings."""
        attempt = AttemptRecord(started=_now(), **facts)
        with self._lock:
            self.change(attempts=(*self.run.attempts, attempt))

    def attempt(self, **facts: Any) -> None:
        """More of the current attempt; nothing before the first."""
        with self._lock:
            if self.run.attempts:
                *before, last = self.run.attempts
                self.change(attempts=(*before, replace(last, **facts)))

    def event(self, kind: str, text: str) -> None:
        with self._lock:
            events = (*self.run.events, RunEvent(at=_now(), kind=kind, text=text))
            self.change(events=events[-_MOST_EVENTS:])

    def change(self, **facts: Any) -> None:
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


def state_folder(room: str, name: str) -> Path:
    """A new folder in a room of the state folder, named after a model; else a `LaunchError`."""
    try:
        return new_path(room, "".join(c if c.isalnum() else "-" for c in name))
    except OSError as exc:
        raise LaunchError(
            f"the state folder cannot be written: {exc.strerror or exc}", hint=_HINT
        ) from None


def run_folder(plan: Plan) -> Path:
    """A folder of the state folder for this run, with its plan; else a `LaunchError`."""
    folder = state_folder("runs", plan.model.name)
    try:
        write_atomic(folder / "plan.json", plan.to_json())
    except UsageError as exc:
        raise LaunchError(exc.message, hint=_HINT) from None
    return folder


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
