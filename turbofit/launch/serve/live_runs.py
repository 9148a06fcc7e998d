"""The servers of this user that run now: what each serves, and how one is found and stopped."""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from turbofit.core.errors import LaunchError, UsageError
from turbofit.core.messages import HOW_TO_SERVE
from turbofit.core.process.files import state_dir
from turbofit.launch.engine.kernel import start_time
from turbofit.launch.serve.runs import RunRecord

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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
