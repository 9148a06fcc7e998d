"""Signals that stop a server or a command in order; the parent process may have blocked some."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sys import UnraisableHookArgs
    from types import FrameType

#: Seconds between two checks of the code that a thread runs.
_PAUSE: Final = 0.001

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
    again = taken[0] if taken else signal.SIGINT
    try:
        with raised_again(KeyboardInterrupt, lambda: signal.raise_signal(again)):
            yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def raised_again(kind: type[BaseException], again: Callable[[], object]) -> Iterator[None]:
    """Raise a signal's exception again if Python swallowed it inside a finalizer.

    ``kind`` is the exception that the handler raises. ``again`` sends the signal again, from
    another thread after this hook has returned: the hook's own exceptions would be swallowed, too.
    """
    before = sys.unraisablehook

    def hook(unraisable: UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, kind):
            before(unraisable)
            return
        with suppress(RuntimeError):  # the interpreter is ending
            _thread.start_new_thread(_once_returned, (_thread.get_ident(), sys._getframe(), again))

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _once_returned(thread: int, frame: FrameType, then: Callable[[], object]) -> None:
    """Call ``then`` after a thread has left a function's frame."""
    while _is_in(thread, frame):
        time.sleep(_PAUSE)
    then()


def _is_in(thread: int, frame: FrameType) -> bool:
    running = sys._current_frames().get(thread)
    while running is not None and running is not frame:
        running = running.f_back
    return running is not None
