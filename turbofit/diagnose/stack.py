"""Follows the traceback in a log: its frames, their source lines, and where it ends."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Literal

from msgspec.structs import replace

from turbofit.diagnose.event import LogEvent
from turbofit.observe.log_events import KnownMessage, NoEvent, PythonFrame

if TYPE_CHECKING:
    from turbofit.core.struct import Struct

#: A row that belongs to a traceback by its form: its head, the sentence between two exceptions of a
#: chain, a line that a notebook draws, or the name of a destructor that failed.
Part = Literal["head", "chain", "rule", "destructor", ""]
_CHAIN: Final = (
    "During handling of the above exception", "The above exception was the direct cause",
)  # fmt: skip
_RULE: Final = "-" * 20
_HEAD: Final = "Traceback (m"
#: An exception in a destructor while the program ends: Python continues. For a stream that could
#: not be written it may be the only message.
_IN_DESTRUCTOR: Final = re.compile(
    r"Exception ignored (?:in|on)\b.{0,240}?(?:__del__|atexit|callback|finalize)"
)
_DESTRUCTOR: Final = (PythonFrame(path="", function="__del__"),)
#: The most rows from a destructor's name to its traceback, and to its error if no frame is shown.
_NEAR, _LONGEST = 3, 60
#: The source line of a frame: indented or, in a notebook, after an arrow.
_CALL: Final = re.compile(r"(?:    |-+> \d+)\s*(.+)")
#: The same if a page has lost the indent; a program's next line has a date or a level instead.
_UNINDENTED: Final = re.compile(r"(?![\[\d]|.{0,60}?\b(?:ERROR|FATAL|CRITICAL)\b)(\S.{4,})")
#: The name of an error in any form: it ends a traceback.
_NAMED: Final = re.compile(r"[\w.]*[A-Z.][\w.]*:?$|[A-Za-z_][\w.]*: ")


def part_of(form: str) -> Part:
    """Which part of a traceback a row is, beside its frames and their source lines."""
    if _HEAD in form:
        return "head"
    if form.startswith(_CHAIN):
        return "chain"
    if form.startswith(_RULE):
        return "rule"
    return "destructor" if _IN_DESTRUCTOR.match(form) else ""


class Stack:
    """The frames of the last traceback, the innermost last."""

    def __init__(self) -> None:
        self.frames: tuple[PythonFrame, ...] = ()
        #: The traceback's last row, while its error has not come.
        self.open: LogEvent | None = None
        #: The line of the last destructor that failed, whose error may come below.
        self._destructor = 0
        #: Whether the previous row is a frame, whose source line comes next.
        self._at_frame = False

    def begin(self, mark: LogEvent, *, in_destructor: bool) -> None:
        """Begin a traceback; one of a destructor has its name in a row shortly before."""
        if in_destructor:
            self._destructor = mark.line
        of_destructor = self._destructor and mark.line - self._destructor <= _NEAR
        self.frames = _DESTRUCTOR if of_destructor else ()
        self.open = mark

    def clear(self) -> None:
        self.frames = ()

    def push(self, mark: LogEvent, frame: PythonFrame) -> None:
        self.frames += (frame,)
        self.open, self._at_frame = mark._replace(stack=self.frames), True

    def call_in(self, mark: LogEvent) -> str:
        """The source line of the last frame, if the row is one, perhaps with known words."""
        at_frame, self._at_frame = self._at_frame, False
        if self.frames == _DESTRUCTOR and mark.line - self._destructor > _LONGEST:
            self.clear()
        silent = isinstance(mark.event, NoEvent)
        if not self.frames or not (silent or self._needs_code(mark.event)):
            return ""
        call = _CALL.match(mark.text)
        if at_frame and silent and not call:
            call = _UNINDENTED.match(mark.text)
        return call[1] if call else ""

    def add_code(self, mark: LogEvent, code: str) -> LogEvent | None:
        """Add the source line to the last frame; None if it had one, or if the row is no code."""
        *outer, last = self.frames
        if last.code or code.startswith(("^", "~")):
            return None
        self.frames = (*outer, replace(last, code=code))
        self.open = LogEvent(mark.line, code, stack=self.frames)
        return self.open

    def end(self, mark: LogEvent, logged: LogEvent | None) -> None:
        """End the traceback at its error, or at a row that names or logs one."""
        error = _NAMED.match(mark.text) or (logged is not None and logged.line == mark.line)
        if error or not isinstance(mark.event, NoEvent):
            self.open = None

    def _needs_code(self, event: Struct) -> bool:
        return isinstance(event, KnownMessage) and not self.frames[-1].code
