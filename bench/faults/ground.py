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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.processes import REPO, STANDIN, Child, alive, free_port, gone, pids
from tests.support.serving import Served, image

__all__ = ["Ground", "Outcome", "alive", "fds", "gone", "image"]

SESSION = REPO / "tests" / "support" / "session_driver.py"


@dataclass
class Outcome:
    ok: bool
    said: str


class Server:
    """One turbofit."""

    def __init__(self, child: Child, port: int, state: Path) -> None:
        self._child, self.port, self._state = child, port, state
        self._served = Served(child, port, state)
        self.process = child.process

    def wait(self, seconds: float = 120.0) -> None:
        """Until it has opened."""
        out = self.process.stdout
        assert out is not None
        self._child.wait_for("phase: ready", limit=seconds)
        if not out.readline():
            raise AssertionError(f"it did not open:\n{self._child.stderr}")

    def wait_for(self, text: str, seconds: float = 60.0, *, count: int = 1) -> None:
        self._child.wait_for(text, count, seconds)

    def engines(self) -> list[int]:
        return pids(self._child)

    def has(self, text: str) -> bool:
        return text in self._child.stderr

    def line(self, text: str) -> str:
        return next((line for line in self._child.lines if text in line), "")

    def run(self) -> Path:
        return max((self._state / "turbofit" / "runs").iterdir(), key=lambda p: p.stat().st_mtime)

    def log(self) -> str:
        return (self.run() / "engine-0.log").read_text(errors="replace")

    def record(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.run() / "run.json").read_text())
        return document

    def chat(self, *parts: dict[str, Any]) -> int:
        """The status of one chat request; 0 where the connection was lost."""
        try:
            return self._served.chat(*parts)[0]
        except Exception:  # noqa: BLE001 - however it was lost
            return 0

    def raw(self, path: str) -> int:
        try:
            return self._served.ask(path, timeout=10)[0]
        except OSError:
            return 0

    def until_answers(self, part: dict[str, Any], seconds: float = 60.0) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.chat(part) == 200:
                return True
            time.sleep(0.5)
        return False

    def end(self, seconds: float = 60.0) -> int:
        """SIGTERM, and its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.finish(seconds)

    def finish(self, seconds: float) -> int:
        try:
            return self._child.finish(seconds)
        except subprocess.TimeoutExpired:
            self._child.kill()
            return -1


class Ground:
    """A context manager."""

    def __enter__(self) -> Ground:
        self._children: list[Child] = []
        self._folder = tempfile.TemporaryDirectory(prefix="turbofit-faults-")
        self._state = Path(self._folder.name)
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
        number = port or free_port()
        argv = [sys.executable, "-m", "turbofit", "serve", *words, "--pretend", "--port",
                str(number)]  # fmt: skip
        return self._start(argv, number, standin=False, **environ)

    def standin(
        self,
        script: str,
        *,
        port: int | None = None,
        timing: dict[str, float] | None = None,
        fixed: dict[str, Any] | None = None,
        **environ: str,
    ) -> Server:
        """A session over the stand-in server."""
        number = port or free_port()
        options = json.dumps({"timing": {"drain": 5.0, **(timing or {})}, "fixed": fixed or {}})
        argv = [sys.executable, str(SESSION), "1xrtx3090", str(number), options]
        count = self._state / f"count-{len(self._children)}"
        return self._start(
            argv, number, standin=True, STANDIN_SCRIPT=script, STANDIN_COUNT=str(count), **environ
        )

    def leases(self) -> list[Path]:
        return sorted((self._state / "leases").glob("*.json"))

    def leases_with_engines(self) -> bool:
        return any(json.loads(path.read_text())["engines"] for path in self.leases())

    def until(self, holds: Callable[[], bool], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds() and time.monotonic() < deadline:
            time.sleep(0.05)

    def torn_record(self, seconds: float) -> Path:
        """A record whose writer was killed after so many seconds of writing without a pause."""
        code = (
            "import sys\nfrom pathlib import Path\n"
            "from turbofit.launch.serve.record import Record\n"
            "record = Record(Path(sys.argv[1]), model='m')\nprint('x', flush=True)\n"
            "for number in range(10**9):\n    record.event('n', 'x' * (number % 5000))\n"
        )
        folder = self._state / "record"
        folder.mkdir(exist_ok=True)
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(folder)], cwd=REPO, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(seconds)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        return folder / "run.json"

    def _start(self, argv: list[str], port: int, *, standin: bool, **environ: str) -> Server:
        child = Child(
            argv, standin=standin, XDG_STATE_HOME=str(self._state),
            TURBOFIT_LEASES=str(self._state / "leases"), **environ,
        )  # fmt: skip
        self._children.append(child)
        return Server(child, port, self._state)


def fds(pid: int) -> int:
    """Open file descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


_ = STANDIN
