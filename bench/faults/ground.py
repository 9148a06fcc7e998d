"""Where faults happen: a fresh state folder each, and servers that are all killed at its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.processes import REPO, Child, free_port, pids, standby_beside
from tests.support.serving import Served


class Outcome(NamedTuple):
    ok: bool
    said: str


class Server(Served):
    """One turbofit; ``chat`` of `Served` becomes a status, 0 where the connection was lost."""

    def opened(self, seconds: float = 120.0) -> None:
        """Wait until it has opened."""
        out = self.child.process.stdout
        assert out is not None
        self.child.wait_for("phase: ready", limit=seconds)
        assert out.readline(), f"it did not open:\n{self.child.stderr}"

    def wait_for(self, text: str, seconds: float = 60.0, *, count: int = 1) -> None:
        self.child.wait_for(text, count, seconds)

    @property
    def process(self) -> subprocess.Popen[str]:
        return self.child.process

    @property
    def run(self) -> Path:
        return max((self.state / "turbofit" / "runs").iterdir(), key=lambda p: p.stat().st_mtime)

    def engines(self) -> list[int]:
        return pids(self.child)

    def has(self, text: str) -> bool:
        return text in self.child.stderr

    def line(self, text: str) -> str:
        return next((line for line in self.child.lines if text in line), "")

    def status(self, *parts: dict[str, Any]) -> int:
        """Of one chat request."""
        try:
            return self.chat(*parts)[0]
        except (OSError, HTTPException, ValueError, LookupError, TypeError):
            return 0

    def until_answers(self, part: dict[str, Any], seconds: float = 60.0) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.status(part) == 200:
                return True
            time.sleep(0.5)
        return False

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

    def pretend(self, *words: str, port: int | None = None, **environ: str) -> Server:
        """``turbofit serve --pretend``."""
        argv = ["-m", "turbofit", "serve", *words, "--pretend", "--port"]
        return self._start(argv, [], port, standin=False, **environ)

    def standin(
        self, script: str, *, on: str = "1xrtx3090", port: int | None = None,
        fixed: dict[str, Any] | None = None, timing: dict[str, float] | None = None,
        gateway: bool = False, **environ: str,
    ) -> Server:  # fmt: skip
        """A session over the stand-in server."""
        timing = {"drain": 5.0, **(timing or {})}
        options = json.dumps({"timing": timing, "fixed": fixed or {}, "gateway": gateway})
        session = REPO / "tests" / "support" / "session_driver.py"
        count = self.state / f"count-{len(self._children)}"
        environ |= {"STANDIN_SCRIPT": script, "STANDIN_COUNT": str(count)}
        return self._start([str(session), on], [options], port, standin=True, **environ)

    def _start(
        self, before: list[str], after: list[str], port: int | None, *, standin: bool,
        **environ: str,
    ) -> Server:  # fmt: skip
        number = port or free_port()
        child = Child(
            [sys.executable, *before, str(number), *after], standin=standin,
            XDG_STATE_HOME=str(self.state), TURBOFIT_LEASES=str(self.state / "leases"), **environ,
        )  # fmt: skip
        self._children.append(child)
        return Server(child, number, self.state)

    def leases(self) -> list[Path]:
        return sorted((self.state / "leases").glob("*.json"))

    def until(self, holds: Callable[[], bool], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds() and time.monotonic() < deadline:
            time.sleep(0.05)
