"""Keeps the files of each run in the state folder, and finds running servers by these files."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final, NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import replace

from turbofit.core.errors import LaunchError, UsageError
from turbofit.core.messages import HOW_TO_SERVE
from turbofit.core.plan import Plan, Settings
from turbofit.core.process.files import new_path, state_dir, unwritable_state, write_atomic
from turbofit.core.process.processes import start_time
from turbofit.core.run_report import RunAttempt, RunEvent, RunReport
from turbofit.core.struct import to_json
from turbofit.core.version import __version__
from turbofit.serving.process.child import child

_MOST_EVENTS = 1000
_HINT = "set XDG_STATE_HOME to a folder that can be written"
#: Set for a server in the background, so that it does not start another one there.
DETACHED: Final = "_TURBOFIT_DETACHED"
#: Seconds between two readings of the log of a server in the background.
_LOOK: Final = 0.2
#: Beginnings of lines of this log that `serve_detached` does not show: its caller has other words.
_TO_OTHERS: Final = ("to ask: ", "ready at ", "ready, ")


class AttemptRecord(RunAttempt):
    """One start of a run; the start's plan is a file in the same folder.

    ``settings`` are of each engine; ``requests_at_once`` is 0 if unknown.
    """

    settings: tuple[Settings, ...] = ()
    requests_at_once: int = 0


class RunRecord(RunReport):
    """The content of ``run.json``; ``pid_started`` is the `start_time` of the server."""

    pid: int
    pid_started: int = 0
    attempts: tuple[AttemptRecord, ...] = ()


class Record:
    """Keeps a run's record in a file; ``facts`` are fields of `RunRecord`."""

    def __init__(self, folder: Path, **facts: Any) -> None:
        self.folder, self._path = folder, folder / "run.json"
        #: Two threads write: the supervisor's thread and the thread of the GPU monitor.
        self._lock = threading.RLock()
        self.run = RunRecord(
            turbofit_version=__version__,
            pid=os.getpid(),
            pid_started=start_time(os.getpid()),
            started=_now(),
            state="starting",
            **facts,
        )
        self.change()

    def begin(self, **facts: Any) -> None:
        """Begin the record of a new start, with its own settings."""
        attempt = AttemptRecord(started=_now(), **facts)
        with self._lock:
            self.change(attempts=(*self.run.attempts, attempt))

    def attempt(self, **facts: Any) -> None:
        """Add facts to the current start; do nothing before the first start."""
        with self._lock:
            if self.run.attempts:
                *before, last = self.run.attempts
                self.change(attempts=(*before, replace(last, **facts)))

    def event(self, kind: str, text: str) -> None:
        """Add an event to the record, with the present time."""
        with self._lock:
            events = (*self.run.events, RunEvent(at=_now(), kind=kind, text=text))
            self.change(events=events[-_MOST_EVENTS:])

    def change(self, **facts: Any) -> None:
        """Change facts of the record, and write the record's file."""
        with self._lock:
            self.run = replace(self.run, **facts)
            with suppress(UsageError, OSError):  # a full disk loses the record, not the server
                write_atomic(self._path, to_json(self.run), mode=0o600)


def state_folder(folder: str, name: str) -> Path:
    """Make a new folder named after a model, in ``folder``, a subfolder of the state folder.

    Raises:
        LaunchError: the state folder cannot be written.
    """
    try:
        return new_path(folder, "".join(c if c.isalnum() else "-" for c in name))
    except OSError as exc:
        raise unwritable_state(exc) from None


def run_folder(plan: Plan) -> Path:
    """Make a new folder for a run of this plan, and write the plan into the folder.

    Raises:
        LaunchError: the state folder cannot be written.
    """
    folder = state_folder("runs", plan.model.name)
    try:
        write_atomic(folder / "plan.json", plan.to_json())
    except UsageError as exc:
        raise LaunchError(exc.message, hint=_HINT) from None
    return folder


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


class LiveRun(NamedTuple):
    """A run's folder and record."""

    folder: Path
    record: RunRecord

    @property
    def name(self) -> str:
        """The name by which `logs`, `stop` and `report` know the server."""
        return self.folder.name

    @property
    def state(self) -> str:
        """The server's state: "asleep" if the run has ended and the process lives."""
        return "asleep" if self.record.state == "ended" else self.record.state


def live_runs() -> list[LiveRun]:
    """Return all running servers of this user; unreadable records are left out.

    A process may have several runs of a model; only the newest run counts.
    """
    newest: dict[tuple[int, str], LiveRun] = {}
    for run in reversed(list(recorded_runs())):
        record = run.record
        if record.pid_started and start_time(record.pid) == record.pid_started:
            newest[record.pid, record.model] = run
    return list(newest.values())


def recorded_runs() -> Iterator[LiveRun]:
    """Yield this user's runs with a readable record, the newest first."""
    for path in sorted(state_dir("runs", make=False).glob("*/run.json"), reverse=True):
        with suppress(OSError, msgspec.MsgspecError):
            yield LiveRun(path.parent, msgspec.json.decode(path.read_bytes(), type=RunRecord))


def live_servers() -> list[LiveRun]:
    """Return the runs of `serve` of `live_runs`, without trials of other commands."""
    return [run for run in live_runs() if run.record.command == "serve"]


def chosen_run(name: str | None) -> LiveRun:
    """Return the running server with this name, model, URL or port; without one, the only server.

    Raises:
        UsageError: no server has the name, or the name is None and several servers run.
    """
    servers = live_servers()
    if name is not None:
        known = _known_as(name)
        servers = [run for run in live_runs() if known & _names_of(run)]
        if not servers:
            raise UsageError(
                f"no server {name!r} runs here",
                hint="turbofit ps lists the servers; turbofit stop --all ends all servers",
            )
    if not servers:
        raise UsageError("no server of this user runs here", hint=HOW_TO_SERVE)
    if len({server.record.pid for server in servers}) > 1:
        names = ", ".join(server.name for server in servers)
        raise UsageError(f"{len(servers)} servers run here", hint=f"name a server: {names}")
    return servers[0]


def _names_of(run: LiveRun) -> set[str]:
    """Return what a server is called by: its run, its model, and its URLs and ports."""
    hosts = [_host_of(url) for url in run.record.urls]
    ports = [host.rpartition(":")[2] for host in hosts]
    return {run.name, run.record.model.casefold(), *hosts, *ports}


def _host_of(url: str) -> str:
    """Return the host and port of a URL; localhost is written as its address."""
    return urlsplit(url).netloc.replace("localhost", "127.0.0.1")


def server_on(port: int) -> LiveRun | None:
    """Return this user's running server that listens on this port; None if there is no server."""
    return next((run for run in live_runs() if str(port) in _names_of(run)), None)


def newest_run_of(name: str) -> Path | None:
    """Return the folder of the newest run with this name, model, URL or port; None without one.

    A model may have any name that `serve` accepts.
    """
    known = _known_as(name)
    return next((run.folder for run in recorded_runs() if known & _names_of(run)), None)


def _known_as(name: str) -> set[str]:
    """Return what a run may be called if a person typed ``name``.

    A URL is its host and port. Another name stands also in lower case, and for the model's name in
    its preset.
    """
    if "://" in name:
        return {_host_of(name)}
    from turbofit.model.presets import find_preset, load_preset

    given = name.rstrip("/").rpartition("/")[2]
    preset = find_preset(name)
    called = set() if preset is None else {load_preset(preset).name.casefold()}
    return {given, given.casefold()} | called


def requests_at(url: str) -> int:
    """Return how many requests the server at a URL runs at once; 0 if the server is unknown."""
    attempts = [run.record.attempts for run in live_runs() if _host_of(url) in _names_of(run)]
    return attempts[0][-1].requests_at_once if len(attempts) == 1 and attempts[0] else 0


def stop_server(server: LiveRun, seconds: float) -> None:
    """End a server as Ctrl-C does, and wait for the end of its process.

    Raises:
        LaunchError: the process cannot be ended, or has not ended after ``seconds``.
    """
    pid = server.record.pid
    try:
        watched = os.pidfd_open(pid)
        try:
            if start_time(pid) != server.record.pid_started:
                return  # the server has ended, and another process has its pid
            signal.pidfd_send_signal(watched, signal.SIGTERM)
            # A process's descriptor becomes readable when the process has ended.
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


class DetachedServer(NamedTuple):
    """A server in the background.

    If the server ended before it opened, ``url`` is empty and ``exit_code`` is set.
    """

    pid: int
    url: str
    log: Path
    exit_code: int | None


def _say_until_open(stdout: IO[bytes], log: Path, say: Callable[[str], None]) -> None:
    """Say each line of a server's log until the server prints its address, or ends."""
    opened, rest = False, ""
    with log.open(encoding="utf-8", errors="replace") as printed:
        while not opened:
            # The output becomes readable with the address, or with the end of the server.
            opened = bool(select.select([stdout], [], [], _LOOK)[0])
            *lines, rest = (rest + printed.read()).split("\n")
            for line in lines:
                if not line.startswith(_TO_OTHERS):
                    say(line)


def serve_detached(words: Sequence[str], say: Callable[[str], None]) -> DetachedServer:
    """Start ``turbofit serve`` with these words in a session of its own, and wait for its opening.

    The wait ends if the server ends. The server's output goes to a log in the state folder, and
    during the wait each line also goes to ``say``. Ctrl-C during the wait ends the server.

    Raises:
        LaunchError: the state folder cannot be written.
    """
    log = state_folder("detached", "serve") / "serve.log"
    interrupted: list[int] = []
    # A KeyboardInterrupt between the start and the wait would leave an unattended server.
    usual = signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
    try:
        with log.open("wb") as file:
            argv = [sys.executable, "-m", "turbofit", "serve", *words]
            server = child(argv, {**os.environ, DETACHED: "1"}, stderr=file, outlives=True)
        assert server.stdout is not None
        try:
            signal.signal(signal.SIGINT, usual)
            if interrupted:
                raise KeyboardInterrupt
            with server.stdout:
                _say_until_open(server.stdout, log, say)
                url = server.stdout.readline().decode("utf-8", "replace").strip()
                ended = None if url else server.wait()
        except BaseException:
            server.send_signal(signal.SIGTERM)
            server.wait()
            raise
    finally:
        signal.signal(signal.SIGINT, usual)
    return DetachedServer(server.pid, url, log, ended)
