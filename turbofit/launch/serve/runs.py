"""What a run keeps below the state folder, and which servers run now by what they keep there."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec.structs import replace

from turbofit.core.errors import LaunchError, UsageError
from turbofit.core.messages import HOW_TO_SERVE
from turbofit.core.plan import Settings
from turbofit.core.process.files import new_path, state_dir, write_atomic
from turbofit.core.run_report import RUN_SCHEMA, RunAttempt, RunEvent, RunReport
from turbofit.core.struct import to_json
from turbofit.core.version import __version__
from turbofit.launch.engine.kernel import start_time

if TYPE_CHECKING:
    from collections.abc import Iterator
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


class LiveRun(NamedTuple):
    folder: Path
    record: RunRecord

    @property
    def name(self) -> str:
        """What `watch`, `logs`, `stop` and `report` take for it."""
        return self.folder.name

    @property
    def state(self) -> str:
        """Where it stands; a run that has ended in a living process is a model that sleeps."""
        return "asleep" if self.record.state == "ended" else self.record.state


def live_runs() -> list[LiveRun]:
    """All of this user, the oldest first. A record that cannot be read is of none.

    A process has a run for each start of a model: the newest one counts.
    """
    newest: dict[tuple[int, str], LiveRun] = {}
    for run in reversed(list(recorded_runs())):
        record = run.record
        if record.pid_started and start_time(record.pid) == record.pid_started:
            newest[record.pid, record.model] = run
    return list(newest.values())


def recorded_runs() -> Iterator[LiveRun]:
    """Runs of this user that can be read, the newest first."""
    for path in sorted(state_dir("runs", make=False).glob("*/run.json"), reverse=True):
        with suppress(OSError, msgspec.MsgspecError):
            yield LiveRun(path.parent, msgspec.json.decode(path.read_bytes(), type=RunRecord))


def chosen_run(name: str | None) -> LiveRun:
    """The running server of this name, or of a model's; the only one without a name.

    Raises:
        UsageError: there is none, or several and none is named.
    """
    servers = live_runs()
    if name is not None:
        known = _known_as(name)
        servers = [run for run in servers if known & {run.name, run.record.model.casefold()}]
        if not servers:
            hint = "turbofit ps lists them; turbofit stop --all ends all"
            raise UsageError(f"no server {name!r} runs here", hint=hint)
    if not servers:
        raise UsageError("no server of this user runs here", hint=HOW_TO_SERVE)
    if len({server.record.pid for server in servers}) > 1:
        names = ", ".join(server.name for server in servers)
        raise UsageError(f"{len(servers)} servers run here", hint=f"name one of them: {names}")
    return servers[0]


def newest_run_of(name: str) -> Path | None:
    """The folder of a model's newest run, by any name that `serve` takes; None where none is."""
    known = _known_as(name)
    runs = (folder for folder, record in recorded_runs() if record.model.casefold() in known)
    return next(runs, None)


def _known_as(name: str) -> set[str]:
    """A run's name, or a model's in small letters: as it was typed, and as its preset calls it."""
    from turbofit.model.presets import find_preset, load_preset

    given = name.rstrip("/").rpartition("/")[2]
    preset = find_preset(name)
    called = set() if preset is None else {load_preset(preset).name.casefold()}
    return {given, given.casefold()} | called


def requests_at(url: str) -> int:
    """Requests that the server at an address runs at once; 0 where none of this user is there."""
    here = url.rstrip("/").replace("//localhost", "//127.0.0.1")
    attempts = [run.record.attempts for run in live_runs() if here in run.record.urls]
    return attempts[0][-1].requests_at_once if len(attempts) == 1 and attempts[0] else 0


def waiting_words(requests: int, running: int) -> str:
    """What becomes of requests that are sent at once; empty where all run, or nobody knows."""
    if not 0 < running < requests:
        return ""
    return (
        f"{requests:,} requests at once are sent; the server runs {running:,} of them at once,"
        " the others wait"
    )


def stop_server(server: LiveRun, seconds: float) -> None:
    """End a server as Ctrl-C does, and wait until it is gone; a `LaunchError` where that fails."""
    pid = server.record.pid
    try:
        watched = os.pidfd_open(pid)
        try:
            if start_time(pid) != server.record.pid_started:
                return  # another process has its number by now
            signal.pidfd_send_signal(watched, signal.SIGTERM)
            # The descriptor of a process can be read once the process has ended.
            ended, _, _ = select.select([watched], [], [], seconds)
        finally:
            os.close(watched)
        why = "" if ended else f"it has not ended after {seconds:.0f} s"
    except ProcessLookupError:
        return
    except OSError as exc:
        why = exc.strerror or str(exc)
    if why:
        raise LaunchError(
            f"{server.name} is not stopped: {why}", hint=f"turbofit logs {server.name} says more"
        )
