"""Ctrl-C, SIGTERM and SIGHUP around a command that holds GPUs or nodes, and the exit code then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

    from turbofit.launch.serve.supervisor import StopSignal

#: A shell's exit code of a command that Ctrl-C ended.
INTERRUPTED: Final = 130

T = TypeVar("T")


def run_until_signal(body: Callable[[StopSignal], T]) -> T | signal.Signals:
    """What a command's body returns that is run while signals are caught.

    It is given the stop that a signal sets. Or the signal that came before anything ran.
    """
    from turbofit.launch.serve.supervisor import StoppedError, StopSignal

    with StopSignal() as stop:
        try:
            return body(stop)
        except StoppedError as exc:
            return exc.signal


def exit_code(ended: signal.Signals | None) -> int:
    """130 after Ctrl-C, else 0: other signals are how a server is stopped in order."""
    return INTERRUPTED if ended is not None and ended.name == "SIGINT" else 0


def say_cut(cut: int) -> None:
    """The last line of a server: how many requests its end has cut off."""
    from turbofit.cli.terminal.output import say

    requests = "1 open request was" if cut == 1 else f"{cut:,} open requests were"
    say(f"ended: {requests} cut off")
