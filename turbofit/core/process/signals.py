"""Signals that stop a server or a command in order; the parent process may have blocked some."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_ALWAYS: Final = (signal.SIGINT, signal.SIGTERM)
#: The signals that stop a command, other than Ctrl-C; Windows has no SIGHUP.
_ENDING: Final = tuple(number for number in signal.Signals if number.name in {"SIGTERM", "SIGHUP"})


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that stop a server in order. Call it before a handler is set.

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
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, so that temporary files are removed.

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
