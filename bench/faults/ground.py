"""Where faults happen: a fresh state folder each, and servers that are all killed at its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tests.support.processes import Child, free_port, pids, standby_beside
from tests.support.serving import Served


class Server(Served):
    """One turbofit; ``chat`` of `Served` becomes a status, 0 where the connection was lost."""

    def opened(self, seconds: float = 120.0) -> None:
        """Wait until it has opened."""
        out = self.child.process.stdout
        assert out is not None
        self.child.wait_for("phase: ready", limit=seconds)
        assert out.readline(), f"it did not open:\n{self.child.stderr}"

    @property
    def process(self) -> subprocess.Popen[str]:
        return self.child.process

    @property
    def run(self) -> Path:
        return max((self.state / "turbofit" / "runs").iterdir(), key=lambda p: p.stat().st_mtime)

    def engines(self) -> list[int]:
        return pids(self.child)

    def status(self, *parts: dict[str, Any]) -> int:
        """Of one chat request."""
        try:
            return self.chat(*parts)[0]
        except (OSError, HTTPException, ValueError, LookupError, TypeError):
            return 0

    def standby(self, seconds: float = 200.0) -> int:
        """The process that stands by, once it has imported all and waits to be told."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid = standby_beside(self.child)
            if pid is not None and _reads_input(pid):
                return pid
            time.sleep(0.1)
        raise TimeoutError(f"nothing stands by:\n{self.child.stderr[-2000:]}")

    def end(self) -> int:
        """SIGTERM, and its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.finish(60)

    def finish(self, seconds: float) -> int:
        try:
            return self.child.finish(seconds)
        except subprocess.TimeoutExpired:
            self.child.kill()
            return -1


def _reads_input(pid: int) -> bool:
    """Whether a process waits in read(2) of its standard input: 0 of x86-64, 63 of arm64."""
    with contextlib.suppress(OSError):
        call = Path(f"/proc/{pid}/syscall").read_text().split()
        return call[0] in ("0", "63") and call[1:2] == ["0x0"]
    return False


class Ground:
    """A context manager."""

    def __enter__(self) -> Ground:
        self._children: list[Child] = []
        self._folder = tempfile.TemporaryDirectory(prefix="turbofit-faults-")
        self.state = Path(self._folder.name)
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            for pid in pids(child):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
            child.kill()
        self._folder.cleanup()

    def pretend(self, *words: str) -> Server:
        """``turbofit serve --pretend``."""
        number = free_port()
        child = Child(
            [sys.executable, "-m", "turbofit", "serve", *words, "--pretend", "--port", str(number)],
            standin=False, XDG_STATE_HOME=str(self.state),
            TURBOFIT_LEASES=str(self.state / "leases"),
        )  # fmt: skip
        self._children.append(child)
        return Server(child, number, self.state)

    def until(self, holds: Callable[[], bool], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds() and time.monotonic() < deadline:
            time.sleep(0.05)
