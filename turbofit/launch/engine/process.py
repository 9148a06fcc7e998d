"""One engine as a process group, whose output is read in a thread."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import LaunchError
from turbofit.core.process.hidden import without_secrets
from turbofit.core.process.log import LazyLogger
from turbofit.launch.engine.guard import guarded
from turbofit.launch.engine.log_file import LogFile, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    #: Starts an engine's command with an environment, as `begin_process` does.
    Begin = Callable[[Sequence[str], Mapping[str, str]], subprocess.Popen[bytes]]

_LOG: Final = LazyLogger(__name__)

#: While an engine prints without pause, this bounds how often we wake up, and slows it down: a full
#: pipe holds 64 KiB.
_PAUSE: Final = 0.02
_CHUNK: Final = 1 << 20


def begin_process(
    argv: Sequence[str], env: Mapping[str, str], stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """A command in its own process group, guarded, with its output in a pipe; else an `OSError`."""
    return subprocess.Popen(
        guarded(argv), env=dict(env), stdin=stdin, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


class EngineProcess:
    """A command in its own process group, and what it prints.

    Start it in the main thread: the engine is killed when the thread that started it ends.
    ``begin`` starts it, `begin_process` where None is given. ``log_required``: it starts only where
    its log can be opened.

    Raises:
        LaunchError: it cannot be started.
    """

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        begin: Begin | None = None,
        *,
        log_required: bool = True,
    ) -> None:
        self.runs: deque[Run] = deque()
        try:  # before the engine exists, so that nothing must be ended
            self._file = LogFile(log, required=log_required)
        except OSError as exc:
            raise LaunchError(
                f"the engine's log cannot be written: {log}: {exc.strerror or exc}",
                hint="set XDG_STATE_HOME to a folder that can be written",
            ) from None
        try:
            self._process = (begin or begin_process)(argv, env)
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
        with contextlib.suppress(PermissionError):  # then `strike` is what is left
            self._process.send_signal(number)

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, seconds))

    def strike(self) -> None:
        """Kill what is left of the group; safe in a signal handler, since it takes no lock."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def kill(self, seconds: float) -> bool:
        """Kill what is left of the group; whether the engine has ended, at most so long after.

        A process that waits in the driver, as for a card off the bus, outlives SIGKILL.
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
    """A command as a shell takes it, without API keys."""
    return shlex.join(without_secrets(argv))
