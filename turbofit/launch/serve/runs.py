"""The servers of this user that run now, and how one is stopped."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from turbofit.core.errors import LaunchError, UsageError
from turbofit.core.messages import HOW_TO_SERVE
from turbofit.core.process.state import state_dir
from turbofit.launch.engine.kernel import start_time
from turbofit.launch.serve.record import RunRecord

__all__ = [
    "LiveRun",
    "chosen_run",
    "live_runs",
    "newest_run_of",
    "recorded_runs",
    "requests_at",
    "stop_server",
    "waiting_words",
]  # fmt: skip


class LiveRun(NamedTuple):
    """A run whose process lives."""

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
