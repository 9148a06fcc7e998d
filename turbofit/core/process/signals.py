"""The signals that end a server or a command, and the object that tells a run to stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

_ALWAYS: Final = (signal.SIGINT, signal.SIGTERM)
#: The signals that stop a command, other than Ctrl-C; Windows has no SIGHUP.
_ENDING: Final = tuple(number for number in signal.Signals if number.name in {"SIGTERM", "SIGHUP"})


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that end a server normally; call this before a handler is set.

    A shell without job control starts ``turbofit serve &`` with SIGINT ignored; SIGINT must stop
    the server nevertheless. SIGHUP is left out if the parent process ignored SIGHUP, as ``nohup``
    does.
    """
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return _ALWAYS if ignored else (*_ALWAYS, signal.SIGHUP)


def unblock(signals: tuple[signal.Signals, ...]) -> None:
    """Unblock signals that the parent process blocked.

    Set handlers first: a pending signal arrives at once.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


@contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt in the block, as Ctrl-C does.

    The command can thus remove its temporary files.

    A signal with a handler, and an ignored signal, stay unchanged. Only the main thread may set
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


class StoppedError(BaseException):
    """Raised by a signal while no engine or server needs an orderly stop."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number


class StopSignal:
    """Holds the signal that ends a run; a second signal makes the end urgent. A context manager.

    The signals are those of `stop_signals`. Use a `StopSignal` in the main thread.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        #: The last signal that came; `end` and `end_now` do not set this field.
        self.received: signal.Signals | None = None
        self.urgent = False
        #: Whether a signal raises `StoppedError`: true while no engine or server needs an orderly
        #: stop.
        self.abrupt = True
        self._handlers: dict[signal.Signals, Any] = {}
        self._before: dict[signal.Signals, Any] = {}
        self._terminals: tuple[int, ...] = ()
        self._urgent_calls: list[Callable[[], None]] = []
        #: What SIGHUP calls in place of the end of the run, unless a terminal has closed. The call
        #: must take no lock.
        self.on_hangup: Callable[[], None] | None = None

    def __enter__(self) -> StopSignal:
        self._terminals = tuple(filter(os.isatty, range(3)))
        numbers = stop_signals()
        self._handlers = dict.fromkeys(numbers, self._caught)
        if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
            # If SIGCHLD is ignored the kernel reaps engines, and their exit status is lost.
            self._handlers[signal.SIGCHLD] = signal.SIG_DFL
        self._before = {number: signal.getsignal(number) for number in self._handlers}
        self.rearm()
        unblock(numbers)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def rearm(self) -> None:
        """Install the signal handlers again: a library may have replaced the handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the run normally, as the signal ``number`` would."""
        self.signal = self.signal or number

    def resume(self) -> bool:
        """Cancel an end that `end` or `end_now` began, so that the run goes on.

        The calls that `on_second` registered are dropped. Returns False, and cancels nothing, if a
        signal has come.
        """
        # In this order a signal that comes meanwhile is not lost.
        self.signal = None
        if self.received is not None:
            self.signal = self.received
            return False
        self._urgent_calls.clear()
        self.abrupt = True
        return True

    def on_second(self, call: Callable[[], None]) -> None:
        """Register a call for the second signal; the call must take no lock."""
        self._urgent_calls.append(call)

    def end_now(self) -> None:
        """End the run immediately, as a second signal would; takes no lock."""
        self.signal = self.signal or signal.SIGTERM
        self.urgent = True
        for call in self._urgent_calls:
            call()

    def _caught(self, number: int, _frame: Any) -> None:
        """Keep a signal; a second signal ends at once; raise if nothing needs an orderly stop."""
        closed = not all(map(os.isatty, self._terminals))
        if number == signal.SIGHUP and self.on_hangup is not None and not closed:
            self.on_hangup()
            return
        if self.signal is not None:
            self.end_now()
        self.signal = self.received = signal.Signals(number)
        if self.abrupt:
            raise StoppedError(self.signal)
