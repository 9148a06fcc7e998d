"""Processes that a test or a bench starts, watches and ends, and free ports for them."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Final

from turbofit.core.process.files import state_dir

REPO: Final = Path(__file__).resolve().parents[2]
STANDIN: Final = Path(__file__).with_name("standin")
#: A folder with a CUDA build of torch (scripts/check makes one); None where there is none.
CUDA_PATH: Final = os.environ.get("TURBOFIT_CUDA_PATH")
HANG: Final = 600.0
"""Seconds after which a test hangs: no machine is so slow."""


def sharing_libraries(state: Path) -> str:
    """A state folder with the pretend libraries of this one; to build others takes seconds."""
    place = state / "turbofit" / "pretend"
    with contextlib.suppress(OSError):
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.symlink_to(state_dir("pretend", make=False).resolve())
    return str(state)


class Child:
    """A process whose stderr is read line by line; its whole group is killed at the end."""

    def __init__(self, argv: list[str], *, standin: bool = True, **environ: str) -> None:
        paths = [str(REPO), *([str(STANDIN)] if standin else [])]
        if "XDG_STATE_HOME" in environ:
            sharing_libraries(Path(environ["XDG_STATE_HOME"]))
        self.process = subprocess.Popen(
            argv,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip())
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    @property
    def stderr(self) -> str:
        """All that was read so far."""
        return "\n".join(self.lines)

    def wait_for(self, text: str, count: int = 1, limit: float = HANG) -> str:
        """Wait until so many lines have this text, and return the last of these."""
        found: list[str] = []

        def there() -> bool:
            found[:] = [line for line in self.lines if text in line]
            return len(found) >= count or self._ended

        with self._news:
            self._news.wait_for(there, limit)
        assert len(found) >= count, f"not {count} times {text!r} in:\n{self.stderr}"
        return found[count - 1]

    def finish(self, limit: float = HANG) -> int:
        """Wait for its end."""
        code = self.process.wait(limit)
        self._reader.join(HANG)
        return code

    def kill(self) -> None:
        """Kill what is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    """Two consecutive ports that nobody has right now; the first.

    From below the range of outgoing connections, where nobody's own end can be in the way later,
    and below that of engines, which other tests may start before it is taken.
    """
    for _ in range(200):
        number = random.randrange(10000, 19998)
        with (
            socket.socket() as first,
            socket.socket() as second,
            contextlib.suppress(OSError),
        ):
            first.bind(("127.0.0.1", number))
            second.bind(("127.0.0.1", number + 1))
            return number
    raise AssertionError("no two free ports")


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(pid: int, limit: float = HANG) -> bool:
    """Whether a process ends, or has ended."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([watched], [], [], limit)[0])
    finally:
        os.close(watched)


def pids(child: Any, name: str = "") -> list[int]:
    """The engines' processes, as the launcher named them, in the order of their starts."""
    return [
        int(line.partition("(process ")[2].partition(",")[0])
        for line in child.lines
        if "(process " in line and name in line
    ]


def standby_beside(child: Any) -> int | None:
    """A server's process that stands by and is none of its engines; None while it calls exec."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid, parent = int(process.name), int((process / "stat").read_text().split()[3])
            words = (process / "cmdline").read_bytes()
            if parent == child.process.pid and b"--standby" in words and pid not in pids(child):
                return pid
    return None


def put_for_python(folder: Path, monkeypatch: Any, script: str) -> None:
    """Let a shell script run wherever this process starts ``sys.executable``."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
