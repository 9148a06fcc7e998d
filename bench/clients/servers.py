"""The two servers: one plan and one engine each, with the gateway in front and without."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

__all__ = ["Server"]

_ROOT = Path(__file__).resolve().parents[2]
#: Seconds until it serves, and until it has ended; far above what either takes.
_START, _END = 900.0, 120.0


class Server:
    """``turbofit serve MODEL --pretend``, from its start to its end.

    Args:
        folder: for its state and its log.
        words: of the command, from the model on.
        gateway: without it LMDeploy's own api_server listens, with the settings of the same plan.
        passed: LMDeploy's options, behind ``--``.
    """

    def __init__(
        self, folder: Path, words: list[str], *, gateway: bool, passed: list[str] | None = None
    ) -> None:
        state = folder.resolve() / ("gateway" if gateway else "plain")
        state.mkdir(parents=True, exist_ok=True)
        self.log = state / "serve.log"
        command = [sys.executable, "-m", "turbofit", "serve", *words, "--pretend"]
        command += ["--port", str(_free_port())]
        command += [] if gateway else ["--no-gateway"]
        command += ["--", *passed] if passed else []
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                cwd=_ROOT,
                env={
                    **os.environ, "XDG_STATE_HOME": str(state),
                    "TURBOFIT_LEASES": str(state / "leases"),
                },
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.strip())
        self._lines.put("")

    def url(self) -> str:
        """Its address, once it serves."""
        try:
            line = self._lines.get(timeout=_START)
        except queue.Empty:
            line = ""
        if not line.startswith("http"):
            self.stop()
            raise SystemExit(f"error: no server\nhint: see {self.log}")
        return line

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def deaths(self) -> int:
        """How often its engine ended while it served."""
        return self.log.read_text(errors="replace").count("the engine ended while it served")

    def stop(self) -> None:
        """End it, with all that it started."""
        if self.alive():
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
