"""An engine as a process group, whose output a thread reads and keeps in a log."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from turbofit.core.errors import LaunchError
from turbofit.core.process.log import LazyLogger
from turbofit.serving.engine.log_file import LogFile, Run
from turbofit.serving.process.child import child
from turbofit.serving.process.hidden import without_secrets

Spawn = Callable[[Sequence[str], Mapping[str, str]], subprocess.Popen[bytes]]

_LOG: Final = LazyLogger(__name__)

#: Seconds between two reads of an engine that prints without pause. The pause saves wake-ups, and
#: slows the engine, since a pipe holds 64 KiB.
_PAUSE: Final = 0.02
_CHUNK: Final = 1 << 20


class EngineProcess:
    """An engine's command in its own process group; a thread keeps its output in a log.

    Create this object in the main thread: the kernel kills the engine when its creating thread
    ends.
    ``spawn`` starts the command; None means `child`. ``log_required``: the command starts only if
    its log can be opened.

    Raises:
        LaunchError: the command cannot be started.
    """

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        spawn: Spawn | None = None,
        *,
        log_required: bool = True,
    ) -> None:
        """Open the log, start the command, and begin to read its output."""
        #: Lines that nobody has taken yet, each with how often it came in a row.
        self.runs: deque[Run] = deque()
        try:  # first, so that an error need not end an engine
            self._file = LogFile(log, required=log_required)
        except OSError as exc:
            raise LaunchError(
                f"the engine's log cannot be written: {log}: {exc.strerror or exc}",
                hint="set XDG_STATE_HOME to a folder that can be written",
            ) from None
        try:
            self._process = (spawn or child)(argv, env)
        except OSError as exc:
            self._file.close()
            raise LaunchError(
                f"{argv[0]} cannot be started: {exc.strerror or exc}", hint="see turbofit machine"
            ) from None
        _LOG.info("process %d: %s", self.pid, shlex.join(without_secrets(argv)))
        self._reader = threading.Thread(target=self._read, name=f"log-{self.pid}", daemon=True)
        self._reader.start()

    @property
    def log_error(self) -> str:
        return self._file.kept.error

    @property
    def pid(self) -> int:
        """The id of the process and of its process group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit code (negative: the signal), or None while the engine runs."""
        return self._process.poll()

    def take(self) -> list[Run]:
        return [self.runs.popleft() for _ in range(len(self.runs))]

    def send(self, number: signal.Signals) -> None:
        with suppress(PermissionError):  # `kill_group` ends such an engine later
            self._process.send_signal(number)

    def wait(self, seconds: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, seconds))

    def kill_group(self) -> None:
        """Kill the group's processes; safe in a signal handler, since no lock is taken."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def kill(self, seconds: float) -> bool:
        """Kill the group's processes; return whether the engine ended within ``seconds``.

        A process that waits in the driver, for example for a lost card, outlives SIGKILL.
        """
        self.kill_group()
        self.wait(seconds)
        return self.poll() is not None

    def finish(self, seconds: float = 2.0) -> list[Run]:
        """Return the last lines after the engine's end; wait at most ``seconds`` for the lines.

        The wait is limited, since a grandchild may keep the pipe open.
        """
        self._reader.join(seconds)
        return self.take()

    def _read(self) -> None:
        """Read the engine's output until its end, in the reader's thread."""
        stream = self._process.stdout
        assert stream is not None
        fd = stream.fileno()
        with suppress(OSError, ValueError):
            while chunk := os.read(fd, _CHUNK):
                self.runs.extend(self._file.feed(chunk))
                if len(chunk) > 4096:
                    time.sleep(_PAUSE)
        self.runs.extend(self._file.close())
