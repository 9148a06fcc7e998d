"""Which signals end a server in order, whatever the parent process left behind."""

from __future__ import annotations

import signal
from typing import Final

__all__ = ["stop_signals", "unblock"]

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
