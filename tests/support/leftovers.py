"""A run of the tests leaves no process: what it has left at its end is named, ended, and fails it.

Whatever a run starts inherits a mark in its environment, and with it the name of the test. Only the
process that starts the run looks, once its workers have ended.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pytest

MARK: Final = "_TURBOFIT_TEST_RUN"
#: Seconds for what is about to end; they only end the wait for what does not.
_LIMIT: Final = float(os.environ.get("_TURBOFIT_TEST_PATIENCE", "60"))
#: Python's own, which ends once its pipe is closed.
_TRACKER: Final = b"multiprocessing.resource_tracker"
_LEFT: Final = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        os.environ[MARK] = uuid4().hex


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput") or not Path("/proc/self/environ").exists():
        return
    session.config.stash[_LEFT] = left = [_ended(pid, test) for pid, test in _still_there()]
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if left := config.stash.get(_LEFT, []):
        terminalreporter.section("processes that this run has left", red=True)
        for line in left:
            terminalreporter.line(line)


def _still_there() -> list[tuple[int, str]]:
    """Processes of this run that do not end by themselves, each with the test that began it."""
    for pid, _ in _marked():
        with suppress(ProcessLookupError):
            watched = os.pidfd_open(pid)
            select.select([watched], [], [], _LIMIT)
            os.close(watched)
    return list(_marked())


def _marked() -> Iterator[tuple[int, str]]:
    mark = f"{MARK}={os.environ[MARK]}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):  # another user's, or it has ended
                variables = (entry / "environ").read_bytes().split(b"\0")
                if mark in variables and _TRACKER not in (entry / "cmdline").read_bytes():
                    of = [one for one in variables if one.startswith(b"PYTEST_CURRENT_TEST=")]
                    test = b"".join(of).partition(b"=")[2].decode(errors="replace")
                    yield int(entry.name), test or "(outside of any test)"


def _ended(pid: int, test: str) -> str:
    """What a process is; it is killed."""
    words = b""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return f"{test}: {pid} {words.decode(errors='replace')[:200]}"
