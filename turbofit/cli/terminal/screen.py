"""What a terminal can do, and the display of progress in a line that is redrawn.

Progress is silent for the first second. A terminal shows one line, which is erased before other
text is written. A pipe or a file gets a new line every ten seconds.
"""

from __future__ import annotations

import _thread
import os
import queue
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from turbofit.core.process.progress import Step

WINDOWS: Final = os.name == "nt"
#: Seconds before progress is shown.
_PATIENCE: Final = 1.0
#: Seconds between two updates.
_TICK: Final = 0.2
#: Seconds between two lines of one step if lines cannot be redrawn.
_SELDOM: Final = 10.0
_SPINNER: Final = "|/-\\"
#: The most columns of a line.
_WIDEST: Final = 100
#: The fewest columns of a bar.
_SHORTEST_BAR: Final = 6
_CLEAR: Final = "\r\x1b[K"

#: The lock for writing to the terminal. Take the lock only by `with`, which is C code: an exception
#: of a signal handler then comes before the lock is taken, or after its release. In Python code
#: (`Condition`, `Event`, `Thread.start`, our context managers) an exception could come between, and
#: nothing would release the lock.
TERMINAL: Final = threading.RLock()


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal; None is a stream that was closed at the start."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def redraws(stream: TextIO | None, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether a line on the stream can be redrawn in its place."""
    return is_terminal(stream) and _is_smart(environ)


def takes_colour(environ: Mapping[str, str]) -> bool:
    """Return whether a terminal shows colours, and its user wants them."""
    return not environ.get("NO_COLOR") and _is_smart(environ)


def width(stream: TextIO | None = None) -> int:
    """Return COLUMNS if it is set, else the columns of the stream's terminal, else 80.

    The default stream is stdout.
    """
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size((stream or sys.stdout).fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _is_smart(environ: Mapping[str, str]) -> bool:
    """Return whether the terminal understands escape sequences."""
    if environ.get("TERM") == "dumb":  # a screen reader, for one, needs lines that stay
        return False
    return not WINDOWS or "WT_SESSION" in environ or "TERM" in environ


class ProgressDisplay:
    """Shows the current step; a thread of its own keeps the shown time running.

    ``in_place``: the display redraws one line; otherwise it writes a new line every ten seconds.

    By the ``clock``, ``_working`` is when the first step began, ``_since`` when the current step
    began, and ``_told`` when its last line was written. ``_initial`` is the part of the step that
    counts in no speed. ``_drawn``: the line is on the terminal. ``_runs``: the thread was started.
    """

    def __init__(
        self, stream: TextIO, *, in_place: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream, self._in_place, self._clock = stream, in_place, clock
        #: A queue that wakes the thread; like `TERMINAL`, it is C code.
        self._woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._step: Step | None = None
        self._working = self._since = self._told = self._initial = 0.0
        self._drawn = self._runs = self._ended = False
        self._frame = 0

    def hear(self, step: Step | None) -> None:
        """Show a step from now on, or nothing for None; the first step starts the thread."""
        with TERMINAL:
            now, before = self._clock(), self._step
            self._step = step
            if step is None:
                self.hide()
                return
            if before is None:
                self._working = now
            if before is None or before.doing != step.doing:
                self._since, self._told, self._initial = now, float("-inf"), step.done
            elif not before.total:
                self._initial = step.done  # the speed starts with the known total
            if not self._runs and not self._ended:
                self._runs = True
                _thread.start_new_thread(self._run, ())
            if before is None:
                self._woken.put(None)

    def hide(self) -> None:
        """Erase the drawn line before other text is written; the caller holds `TERMINAL`."""
        if self._drawn:
            self._drawn = False
            self._write(_CLEAR)

    def end(self) -> None:
        """Erase the line, and let the thread end."""
        with TERMINAL:
            self._ended, self._step = True, None
            self.hide()
        self._woken.put(None)

    def look(self) -> None:
        """Show the step if an update is due; the caller holds `TERMINAL`."""
        now, step = self._clock(), self._step
        if step is None or now - self._working < _PATIENCE:
            return
        if self._in_place:
            self._frame += 1
            self._write(_CLEAR + self._line(step, now - self._since))
            self._drawn = True
        elif now - self._told >= _SELDOM:
            self._told = now
            self._write(f"{step.text}{self._times(step, now - self._since)}\n")

    def _run(self) -> None:
        while not self._ended:
            with suppress(queue.Empty):
                self._woken.get(timeout=None if self._step is None else _TICK)
            with TERMINAL:
                self.look()

    def _line(self, step: Step, seconds: float) -> str:
        """Return a line for the terminal; the last column stays free, since a full line wraps.

        A narrow terminal has no bar, and shows the beginning of the text.
        """
        columns = min(width(self._stream), _WIDEST) - 1
        if not step.total:
            frame = _SPINNER[self._frame % len(_SPINNER)]
            return f"{frame} {step.text}, {_seconds(seconds)}"[:columns]
        text = f"{step.text}{self._times(step, seconds)}"
        room = columns - len(text) - 3
        if room >= _SHORTEST_BAR:
            done = round(room * min(1.0, step.done / step.total))
            bar = "".ljust(done, "#").ljust(room, ".")
            return f"[{bar}] {text}"
        return text[:columns]

    def _times(self, step: Step, seconds: float) -> str:
        """Say how many seconds the step has taken, and how many are left at the speed so far."""
        if seconds < 1:
            return " …"
        new = step.done - self._initial
        if not new > 0 or step.done >= step.total:
            return f", {_seconds(seconds)}"
        return f", {_seconds(seconds)}, {_seconds(seconds / new * (step.total - step.done))} left"

    def _write(self, text: str) -> None:
        """Write a text; errors are ignored, since the work must go on without a terminal."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._drawn = False


def _seconds(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
