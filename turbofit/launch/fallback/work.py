"""The state of the fallback engine: its one request, the cancellation, when it last made progress.

Shared by the event loop, which takes requests, and the thread that generates.
"""

from __future__ import annotations

import threading
import time
from typing import Final, Literal

__all__ = ["STALLED", "ServedWork"]

#: Seconds without a token after which the engine counts as stuck. Above any prefill: the slowest
#: reads most of the model from disk once.
STALLED: Final = 900.0
#: Requests in a row that ran out of memory after which starting again is better than going on.
_MOST_SHORT: Final = 3


class ServedWork:
    """The state of the one request.

    Attributes:
        cancelled: set when nobody waits for the answer any more.
        idle: set while nothing is generated.
        begun: whether the current request came so far as to generate.
        fatal: why the process must end, empty while it may live.
    """

    def __init__(self) -> None:
        self.cancelled, self.idle = threading.Event(), threading.Event()
        self.idle.set()
        self.begun = False
        self.fatal = ""
        self.short = False
        self._moved = time.monotonic()
        self._answered = self._shortages = 0

    def take(self) -> None:
        """A new request is at work."""
        self.cancelled.clear()
        self.begun = self.short = False
        self.moved()

    def moved(self) -> None:
        """A token came, or a request."""
        self._moved = time.monotonic()

    def start(self) -> None:
        """Generation begins."""
        self.begun = True
        self.moved()
        self.idle.clear()

    def done(self) -> None:
        """Generation ended, in whatever way."""
        self.idle.set()

    def answered(self) -> None:
        """A request was answered."""
        self._answered += 1
        self._shortages = 0

    def ran_short(self, message: str) -> None:
        """A request ran out of GPU memory.

        After torch's exception the engine can go on. But an engine that has never answered, or that
        runs out again and again, would do so for ever: it ends with torch's message, from which the
        supervisor plans anew.
        """
        self.short = True
        self._shortages += 1
        if not self._answered or self._shortages >= _MOST_SHORT:
            self.fatal = f"torch.OutOfMemoryError: {message}"

    @property
    def health(self) -> Literal["ok", "stalled"]:
        """Whether tokens come while something is generated."""
        if self.idle.is_set() or time.monotonic() - self._moved < STALLED:
            return "ok"
        return "stalled"
