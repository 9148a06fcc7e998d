"""Which signals end a server or a command in order, whatever the parent process left behind."""

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

#: Seconds between two looks at what a thread runs.
_PAUSE: Final = 0.001

_ALWAYS: Final = (signal.SIGINT, signal.SIGTERM)
#: What ends a command beside Ctrl-C; Windows has no SIGHUP.
_ENDING: Final = tuple(number for number in signal.Signals if number.name in {"SIGTERM", "SIGHUP"})


def stop_signals() -> tuple[signal.Signals, ...]:
    """Signals that end a server in order. Ask before a handler is set.

    A shell without job control starts ``turbofit serve &`` with SIGINT ignored: it must end all the
    same. SIGHUP is left out where the parent process ignored it, as ``nohup`` does.
    """
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return _ALWAYS if ignored else (*_ALWAYS, signal.SIGHUP)


def unblock(signals: tuple[signal.Signals, ...]) -> None:
    """Let signals through that the parent process blocked.

    Call it when handlers are set, since a pending signal arrives at once.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


@contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt: temporary files go as after Ctrl-C.

    A signal that has a handler, or is ignored, stays as it is. Only the main thread may set
    handlers; in another thread nothing changes.
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
    """Raise a signal's exception once more where Python swallowed it, inside a finalizer.

    ``kind`` is what the handler raises. ``again`` sends the signal again, in another thread and
    once this hook has returned: what is raised while it runs would be swallowed, too.
    """
    before = sys.unraisablehook

    def hook(unraisable: UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, kind):
            before(unraisable)
            return
        with suppress(RuntimeError):  # the interpreter ends
            _thread.start_new_thread(_once_returned, (_thread.get_ident(), sys._getframe(), again))

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _once_returned(thread: int, frame: FrameType, then: Callable[[], object]) -> None:
    """Call ``then`` once a thread has left a function's frame."""
    while _is_in(thread, frame):
        time.sleep(_PAUSE)
    then()


def _is_in(thread: int, frame: FrameType) -> bool:
    running = sys._current_frames().get(thread)
    while running is not None and running is not frame:
        running = running.f_back
    return running is not None
