"""Handles Ctrl-C, SIGTERM and SIGHUP for commands that hold GPUs or nodes; gives exit codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

    from turbofit.serving.supervisor import StopSignal

T = TypeVar("T")

INTERRUPTED: Final = 130


def run_until_signal(body: Callable[[StopSignal], T]) -> T | signal.Signals:
    """Call a body with the stop that signals set; returns its result, or the signal that came."""
    from turbofit.serving.supervisor import StoppedError, StopSignal

    with StopSignal() as stop:
        try:
            return body(stop)
        except StoppedError as exc:
            return exc.signal


def exit_code(ended: signal.Signals | None) -> int:
    """130 after Ctrl-C, else 0, since other signals stop a server normally."""
    return INTERRUPTED if ended is not None and ended.name == "SIGINT" else 0
