"""Starts child processes, and handles the signals that stop a server or a command in order."""

from __future__ import annotations

import signal
import subprocess
import threading
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_ALWAYS: Final = (signal.SIGINT, signal.SIGTERM)
#: The signals that stop a command, other than Ctrl-C; Windows has no SIGHUP.
_ENDING: Final = tuple(number for number in signal.Signals if number.name in {"SIGTERM", "SIGHUP"})


def child(
    words: Sequence[str],
    env: Mapping[str, str] | None = None,
    *,
    stdin: int = subprocess.DEVNULL,
    stderr: int | IO[bytes] = subprocess.STDOUT,
    outlives: bool = False,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start a command, with its output in a pipe, in a process group that Ctrl-C does not reach.

    Unless it ``outlives`` this process, the kernel kills it, with all that it started, when the
    calling thread ends: so call this in the main thread.

    Raises:
        OSError: the command cannot be started.
    """
    from turbofit.core.process.guard import guarded  # a plan that asks for an output needs none

    return subprocess.Popen(
        list(words) if outlives else guarded(words),
        env=None if env is None else dict(env),
        stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True, cwd=cwd,
    )  # fmt: skip


def output_of(
    words: Sequence[str], seconds: float, env: Mapping[str, str] | None = None
) -> bytes | None:
    """Return a command's output; None if it cannot be started, fails, or takes too long."""
    try:
        return subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=True,
            env=None if env is None else dict(env),
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that end a server normally; call this before a handler is set.

    A shell without job control starts ``turbofit serve &`` with SIGINT ignored; SIGINT must stop it
    nevertheless. SIGHUP is left out if the parent process ignored it, as ``nohup`` does.
    """
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return _ALWAYS if ignored else (*_ALWAYS, signal.SIGHUP)


def unblock(signals: tuple[signal.Signals, ...]) -> None:
    """Unblock signals that the parent process blocked.

    Call it when handlers are set, since a pending signal arrives at once.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


@contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt in the block, as Ctrl-C does.

    So temporary files are removed at the end.

    A signal that already has a handler, or is ignored, stays as it is. Only the main thread may set
    handlers, so nothing changes in another thread.
    """
    main = threading.current_thread() is threading.main_thread()
    taken = [number for number in _ENDING if main and signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
