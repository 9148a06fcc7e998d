"""Ctrl-C, SIGTERM and SIGHUP around a command that holds GPUs or nodes, and the exit code then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

    from turbofit.launch.serve.supervisor import StopSignal

T = TypeVar("T")

INTERRUPTED: Final = 130


def run_until_signal(body: Callable[[StopSignal], T]) -> T | signal.Signals:
    """What a body returns, which gets the stop that a signal sets; or the signal that ended it."""
    from turbofit.launch.serve.supervisor import StoppedError, StopSignal

    with StopSignal() as stop:
        try:
            return body(stop)
        except StoppedError as exc:
            return exc.signal


def exit_code(ended: signal.Signals | None) -> int:
    """130 after Ctrl-C, else 0: other signals stop a server in order."""
    return INTERRUPTED if ended is not None and ended.name == "SIGINT" else 0
