"""One engine as a process: its group, its output, its end."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import LaunchError
from turbofit.core.process.log import LazyLogger
from turbofit.launch.engine.logfile import LogFile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turbofit.launch.engine.logfile import Run

_LOG: Final = LazyLogger(__name__)

#: A full pipe holds 64 KiB: while an engine prints without pause, this bounds how often we wake up,
#: and slows the engine down.
_PAUSE: Final = 0.02
_CHUNK: Final = 1 << 20


class EngineProcess:
    """Starts a command in its own process group and reads what it prints.

    Start it in the main thread: the engine is killed when the thread that started it ends.
    ``log_required``: it is started only where its log can be opened.

    Raises:
        LaunchError: it cannot be started.
    """

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str], log: Path, *, log_required: bool = True
    ) -> None:
        self.log = log
        self.runs: deque[Run] = deque()
        guard = str(Path(__file__).with_name("guard.py"))
        try:  # before the engine exists, so that nothing must be ended
            self._file = LogFile(log, required=log_required)
        except OSError as exc:
            raise LaunchError(
                f"the engine's log cannot be written: {log}: {exc.strerror or exc}",
                hint="set XDG_STATE_HOME to a folder that can be written",
            ) from None
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", guard, str(os.getpid()), *argv],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as exc:
            self._file.close()
            raise LaunchError(
                f"{argv[0]} cannot be started: {exc.strerror or exc}", hint="see turbofit machine"
            ) from None
        _LOG.info("process %d: %s", self.pid, command_text(argv))
        self._reader = threading.Thread(target=self._read, name=f"log-{self.pid}", daemon=True)
        self._reader.start()

    @property
    def log_error(self) -> str:
        """Why its log could not be opened; empty where it could."""
        return self._file.kept.error

    @property
    def pid(self) -> int:
        """The process, which is also its process group."""
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code (negative: the signal), or None while it runs."""
        return self._process.poll()

    def take(self) -> list[Run]:
        return [self.runs.popleft() for _ in range(len(self.runs))]

    def send(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(PermissionError):  # then `strike` is what is left
                self._process.send_signal(number)

    def wait(self, seconds: float) -> None:
        """Wait for its end, at most so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, seconds))

    def strike(self) -> None:
        """Kill what is left of the group; safe in a signal handler, since it takes no lock."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def kill(self, seconds: float) -> bool:
        """Kill whatever is left of the group; whether the engine has ended, at most so long after.

        A process that waits in the driver, e.g. for a card that has fallen off the bus, outlives
        SIGKILL.
        """
        self.strike()
        self.wait(seconds)
        return self.poll() is not None

    def finish(self, seconds: float = 2.0) -> list[Run]:
        """After its end: what it said last. A grandchild may hold the pipe open, so do not wait."""
        self._reader.join(seconds)
        return self.take()

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        fd = stream.fileno()
        with contextlib.suppress(OSError, ValueError):
            while chunk := os.read(fd, _CHUNK):
                self.runs.extend(self._file.feed(chunk))
                if len(chunk) > 4096:
                    time.sleep(_PAUSE)
        self.runs.extend(self._file.close())


def command_text(argv: Sequence[str]) -> str:
    """A command as a shell takes it, with ``...`` for API keys."""
    said: list[str] = []
    keys = False
    for word in argv:
        if word.startswith("--"):
            keys = word.partition("=")[0] in ("--api-key", "--api-keys")
            said.append(word.partition("=")[0] if keys else word)
        elif not keys:
            said.append(word)
        elif said[-1] != "...":
            said.append("...")
    return shlex.join(said)
