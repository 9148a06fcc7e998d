"""The event that a log describes, found line by line; the causes are searched only for it.

If an engine becomes ready, errors before that did not end it; nor did errors before a program's
progress lines. A line about trouble is therefore a candidate until a later line rules it out.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from turbofit.core.struct import Struct
from turbofit.diagnose.rules.causes import END
from turbofit.observe.log_events import (
    FATAL,
    KnownMessage,
    NoEvent,
    PythonError,
    PythonFrame,
    ServerUp,
    WarmupFinished,
)

if TYPE_CHECKING:
    from turbofit.diagnose.rules.causes import Hit, Row

#: The last line of a traceback.
_RAISED: Final = re.compile(r"(?:\w+\.){0,9}[A-Z]\w*(?:Error|Exception|Exit|Interrupt)(?:: |$)")
#: Messages after which a program continues, by the level that it prints.
_WARNED: Final = re.compile(
    r"\W*(?:INFO|DEBUG|WARN(?:ING)?)\b|.{0,240}?(?:\bWARNING\b|[a-z]Warning: "
    r"|\b[Ff]all(?:s|ing)?[ -]?back|\b[Rr]etrying\b)"
)
#: The form of Python's warnings module, for any message.
_PYTHON_WARNING: Final = re.compile(r"\S*\.py:\d+: \w*Warning: ")
#: Kinds that concern the machine: a warning of one is an answer in itself, from any program.
_MACHINE: Final = (
    "no_gpu", "driver_too_old", "driver_mismatch", "gpu_too_new", "gpu_too_old", "no_kernel_image",
    "gpu_lost", "shared_memory", "disk_full", "ray_waits",
)  # fmt: skip
#: Words of faults after which a process has no CUDA context or no communicator, so that it ends.
_NEVER_OUTLIVED: Final = ("CUDA error", "CUDA runtime error", "[TM][FATAL]", "NCCL")
#: Functions that a program runs while it ends; an error in one is not the reason for its end.
CLEANS_UP: Final = (
    "_loop_finally", "release", "__del__", "shutdown", "_exit_function", "atexit", "terminate",
    "__exit__", "_cleanup", "cleanup",
)  # fmt: skip


class LogEvent(NamedTuple):
    """An event and the line that contains it.

    ``stack`` has the Python frames before it, the innermost last; ``time`` is TurboMind's, or
    empty. ``hits`` are the rows of `presets/causes.yaml` that match the line.
    """

    line: int
    text: str
    event: Struct = NoEvent()
    stack: tuple[PythonFrame, ...] = ()
    time: str = ""
    hits: tuple[Hit, ...] = ()

    @property
    def row(self) -> Row | None:
        return self.hits[0].row if self.hits else None

    @property
    def of_machine(self) -> bool:
        return self.row is not None and self.row.kind in _MACHINE

    @property
    def of_title(self) -> bool:
        """Whether the line is the title of a page or an issue, which repeats a line of the log."""
        return self.text.startswith("# ")

    @property
    def cleans_up(self) -> bool:
        """Whether the program raised it while it ended itself."""
        return any(frame.function in CLEANS_UP for frame in self.stack)


class Event(Struct):
    """The event of a run.

    ``outcome``: ``fatal`` (an exception, abort, signal or kill ended the run), ``complaint`` (the
    program itself says that it refuses, cuts or waits) or ``nothing``. ``marks`` are its lines in
    the
    log's order: workers print an error before their parent. ``last``: the last unknown exception.
    """

    outcome: Literal["fatal", "complaint", "nothing"]
    marks: tuple[LogEvent, ...] = ()
    last: LogEvent | None = None


def _without_title(marks: list[LogEvent]) -> list[LogEvent]:
    """Drop the titles, which repeat a line; keep one if the log has only consequences of it."""
    below = [mark for mark in marks if not mark.of_title]
    if all(mark.row is not None and mark.row.rank == "consequence" for mark in below):
        return [mark for mark in marks if not mark.of_title or type(mark.event) is KnownMessage]
    return below


class EventFinder:
    """Collects candidates for the event of one run."""

    def __init__(self) -> None:
        self._fatal: list[LogEvent] = []
        self._warned: list[LogEvent] = []
        self._complaints: list[LogEvent] = []
        self._last: LogEvent | None = None
        #: The last two lines of progress; the run survived the errors before the first of them.
        self._progress = (0, 0)

    @property
    def event(self) -> Event:
        fatal = list(self._fatal)
        # Torch warns about the driver and later says that it has no GPU: the warning is the reason.
        # A warning alone is the event only if it concerns the machine; others are survived.
        if all(mark.row is not None and mark.row.kind == "no_gpu" for mark in fatal):
            fatal += [mark for mark in self._warned if fatal or mark.of_machine]
        if not fatal:
            outcome: Literal["complaint", "nothing"] = (
                "complaint" if self._complaints else "nothing"
            )
            return Event(outcome=outcome, marks=tuple(self._complaints))
        marks = sorted((*fatal, *self._complaints), key=lambda mark: mark.line)
        return Event(outcome="fatal", marks=tuple(_without_title(marks)), last=self._last)

    def progressed(self, line: int) -> None:
        self._progress = (self._progress[1], line)

    def take(self, mark: LogEvent) -> None:
        """Take an event, and drop earlier ones that the run survived, or that are only words."""
        if isinstance(mark.event, ServerUp | WarmupFinished):
            self._fatal, self._warned = [], []
        elif isinstance(mark.event, KnownMessage) and mark.row and mark.row.rank == "notice":
            self._complaints.append(mark)
        elif isinstance(mark.event, KnownMessage):
            if _RAISED.match(mark.text):
                self._fatal = [one for one in self._fatal if one.of_machine or _ends(one)]
            warns = _WARNED.match(mark.text) and not mark.of_title
            (self._warned if warns else self._fatal).append(mark)
        elif isinstance(mark.event, FATAL):
            self._take_fatal(mark)

    def replace(self, old: LogEvent, new: LogEvent) -> None:
        """Replace the first line of a message by the whole message, joined from several lines."""
        for found in (self._fatal, self._warned, self._complaints):
            if old in found:
                found.remove(old)
        if self._last == old:
            self._last = None
        self.take(new)

    def _take_fatal(self, mark: LogEvent) -> None:
        if isinstance(mark.event, PythonError):
            self._last = mark
            survived = self._progress[0]
            self._fatal = [
                one for one in self._fatal if _ends(one) and not _outlived(one, survived)
            ]
        (self._warned if _PYTHON_WARNING.match(mark.text) else self._fatal).append(mark)


def _ends(mark: LogEvent) -> bool:
    """Whether a line ends a run, other than by words that an exception may contain."""
    return not isinstance(mark.event, KnownMessage) or END.search(mark.text) is not None


def _outlived(mark: LogEvent, survived: int) -> bool:
    """Whether the run went on after an error, until the line that it ``survived``."""
    ends = any(word in mark.text for word in _NEVER_OUTLIVED)
    return mark.line < survived and isinstance(mark.event, KnownMessage | PythonError) and not ends
