"""A run's record, ``run.json`` in its folder; this user's runs, and how one is stopped."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec.structs import replace

from turbofit.core.errors import LaunchError, UsageError
from turbofit.core.messages import HOW_TO_SERVE
from turbofit.core.plan import Limits, Settings
from turbofit.core.process.files import write_atomic
from turbofit.core.process.state import new_path, state_dir
from turbofit.core.run_report import RUN_SCHEMA, RunAttempt, RunEvent, RunReport
from turbofit.core.struct import to_json
from turbofit.core.version import __version__
from turbofit.launch.engine.kernel import start_time

if TYPE_CHECKING:
    from turbofit.core.json_types import Options
    from turbofit.core.plan import Plan

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
    try:
        return new_path(room, "".join(c if c.isalnum() else "-" for c in name))
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


# The servers of this user that run now, and how one is stopped.


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
    found: dict[tuple[int, str], LiveRun] = {}
    for folder, record in reversed(list(recorded_runs())):
        if record.pid_started and start_time(record.pid) == record.pid_started:
            found[record.pid, record.model] = LiveRun(folder, record)
    return list(found.values())


def recorded_runs() -> Iterator[tuple[Path, RunRecord]]:
    """The folders and records of this user's runs, the newest first; those that can be read."""
    for path in sorted(state_dir("runs", make=False).glob("*/run.json"), reverse=True):
        with suppress(OSError, msgspec.MsgspecError):
            yield path.parent, msgspec.json.decode(path.read_bytes(), type=RunRecord)


def chosen_run(name: str | None) -> LiveRun:
    """The running server of this name, or of a model's; the only one without a name.

    Raises:
        UsageError: there is none, or several and none is named.
    """
    servers = live_runs()
    if name is not None:
        known = _known_as(name)
        servers = [one for one in servers if known & {one.name, one.record.model.casefold()}]
        if not servers:
            raise UsageError(f"no server {name!r} runs here", hint="turbofit ps lists them")
    if not servers:
        raise UsageError("no server of this user runs here", hint=HOW_TO_SERVE)
    if len({one.record.pid for one in servers}) > 1:
        names = ", ".join(one.name for one in servers)
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
    found = [one.record.attempts for one in live_runs() if here in one.record.urls]
    return found[0][-1].requests_at_once if len(found) == 1 and found[0] else 0


def waiting_words(requests: int, running: int) -> str:
    """What becomes of requests that are sent at once; empty where all run, or nobody knows."""
    if not 0 < running < requests:
        return ""
    return (
        f"{requests:,} requests at once are sent; the server runs {running:,} of them at once,"
        " the others wait"
    )


def stop_server(server: LiveRun, seconds: float) -> None:
    """Ask a server to end, as Ctrl-C does, and wait until its process is gone.

    Raises:
        LaunchError: it cannot be asked, or did not end in time.
    """
    pid = server.record.pid
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except OSError as exc:
        raise _not_stopped(server, exc.strerror or str(exc)) from None
    try:
        if start_time(pid) != server.record.pid_started:
            return  # another process has its number by now
        signal.pidfd_send_signal(watched, signal.SIGTERM)
        # The descriptor of a process can be read once the process has ended.
        if not select.select([watched], [], [], seconds)[0]:
            raise _not_stopped(server, f"it still ends after {seconds:.0f} s")
    except OSError as exc:
        raise _not_stopped(server, exc.strerror or str(exc)) from None
    finally:
        os.close(watched)


def _not_stopped(server: LiveRun, why: str) -> LaunchError:
    return LaunchError(
        f"{server.name} is not stopped: {why}", hint=f"turbofit logs {server.name} says more"
    )
