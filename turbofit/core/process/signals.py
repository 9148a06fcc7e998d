"""Which signals end a server or a command in order, whatever the parent process left behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["ended_like_ctrl_c", "stop_signals", "unblock"]

_ALWAYS: Final = (signal.SIGINT, signal.SIGTERM)


def stop_signals() -> tuple[signal.Signals, ...]:
    """Signals that end a server in order. Ask before a handler is set.

    SIGINT and SIGTERM always do: a shell without job control starts ``turbofit serve &`` with
    SIGINT ignored, and a server that holds GPUs must end all the same. SIGHUP does unless the
    parent process ignored it, which is what ``nohup`` asks for.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return _ALWAYS
    return (*_ALWAYS, signal.SIGHUP)


def unblock(signals: tuple[signal.Signals, ...]) -> None:
    """Let signals through that the parent process blocked.

    Call it when handlers are set, since a pending signal arrives at once. Processes that this
    thread starts later inherit the new mask.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


@contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt: temporary files go as after Ctrl-C.

    A signal that has a handler, or is ignored, stays as it is. Only the main thread may set
    handlers; in another thread nothing changes.
    """
    ending = (signal.SIGTERM, signal.SIGHUP)
    main = threading.current_thread() is threading.main_thread()
    taken = [one for one in ending if main and signal.getsignal(one) is signal.SIG_DFL]
    for one in taken:
        signal.signal(one, signal.default_int_handler)
    try:
        yield
    finally:
        for one in taken:
            signal.signal(one, signal.SIG_DFL)
