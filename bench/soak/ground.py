"""A fresh state folder, and a server of each kind in it that is killed at its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.processes import REPO, Child, free_port, pids
from tests.support.serving import Served

__all__ = ["Ground"]


class Server(Served):
    """One turbofit; a start-up may leave older runs in its state folder."""

    @property
    def run(self) -> Path:
        return max((self.state / "turbofit" / "runs").iterdir(), key=lambda p: p.stat().st_mtime)

    def end(self) -> int:
        """SIGTERM, and its exit code; -1 where it does not end within a minute."""
        self.child.process.send_signal(signal.SIGTERM)
        try:
            return self.child.finish(60)
        except subprocess.TimeoutExpired:
            self.child.kill()
            return -1


class Ground:
    """A context manager."""

    def __enter__(self) -> Ground:
        self._children: list[Child] = []
        self._folder = tempfile.TemporaryDirectory(prefix="turbofit-soak-")
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
        return self._start(["-m", "turbofit", "serve", *words, "--pretend", "--port"])

    def standin(self, *, on: str, fixed: dict[str, Any]) -> Server:
        """A session over the stand-in server, behind the gateway."""
        timing = {"drain": 5.0, "backoff": 1.0}
        options = json.dumps({"timing": timing, "fixed": fixed, "gateway": True})
        session = REPO / "tests" / "support" / "session_driver.py"
        environ = {"STANDIN_SCRIPT": "serve", "STANDIN_COUNT": str(self.state / "count")}
        return self._start([str(session), on], options, **environ)

    def _start(self, before: list[str], *after: str, **environ: str) -> Server:
        number = free_port()
        child = Child(
            [sys.executable, *before, str(number), *after], standin=bool(after),
            XDG_STATE_HOME=str(self.state), TURBOFIT_LEASES=str(self.state / "leases"), **environ,
        )  # fmt: skip
        self._children.append(child)
        return Server(child, number, self.state)
