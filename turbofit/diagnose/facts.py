"""Reads a log once, and collects the facts of each run of an engine, with their lines."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, TypeVar

from turbofit.diagnose.event import EventFinder, LogEvent
from turbofit.diagnose.mood import Mood
from turbofit.diagnose.rules.causes import hits_of, told_figures
from turbofit.diagnose.subject import FactCollector
from turbofit.diagnose.told import ToldLines
from turbofit.launch.engine.process import repeats
from turbofit.machine.nvidia_smi import SmiTable
from turbofit.observe.log_events import (
    OF_LAUNCH,
    OF_MACHINE,
    Backpressure,
    CheckFailed,
    CudaError,
    KnownMessage,
    LegacyCuda,
    NcclError,
    PythonError,
    PythonFrame,
    ServerFigures,
    Starting,
    TorchMemory,
    WarmupLengths,
)
from turbofit.observe.log_reader import by_form, read_line, torch_memory
from turbofit.observe.stages import Course

if TYPE_CHECKING:
    from collections.abc import Iterable

    from turbofit.core.struct import Struct
    from turbofit.diagnose.rows import Row
    from turbofit.diagnose.rules.causes import Hit

_TIME: Final = re.compile(r"\[TM\]\[[A-Z]+\]\[(\d{4}\.[\d:.]+)\]")
_T = TypeVar("_T", bound="Struct")
#: The beginning of an engine: its command, its progress bars, and its lines before the weights.
_BEGUN: Final = re.compile(
    r"\blmdeploy (?:serve|chat)\b|\bapi_server\b|\bturbofit \w+ |\bpipeline\(|\bLoading\b"
    r"|max_context_token_num"
)
#: Lines that only an engine which is started again prints again.
_BEGINS: Final = re.compile(
    r"\blmdeploy (?:serve|chat) |\bturbofit serve |\bLoading[\w ]*: +0%|max_context_token_num"
)
#: Words of both patterns: most lines have none of them.
_BEGINNINGS: Final = (
    "lmdeploy serve", "lmdeploy chat", "api_server", "turbofit ", "pipeline(", "Loading",
    "max_context_token_num",
)  # fmt: skip
#: A command that somebody ran, with or without a shell's prompt.
_COMMAND: Final = re.compile(
    r"[$#>] \w|(?:lmdeploy|docker|podman|python[\d.]*|torchrun|accelerate) +[\w./-]+ "
)
#: The source line of a frame: indented or, in a notebook, after an arrow.
_CALL: Final = re.compile(r"(?:    |-+> \d+)\s*(.+)")
#: The same if a page has lost the indent; a program's next line has a date or a level instead.
_UNINDENTED: Final = re.compile(r"(?![\[\d]|.{0,60}?\b(?:ERROR|FATAL|CRITICAL)\b)(\S.{4,})")
#: An exception in a destructor while the program ends: Python continues. For a stream that could
#: not be written it may be the only message.
_IN_DESTRUCTOR: Final = re.compile(
    r"Exception ignored (?:in|on)\b.{0,240}?(?:__del__|atexit|callback|finalize)"
)
#: A Python warning whose text is missing, or ends with a colon.
_WARNS_BELOW: Final = re.compile(r".{0,240}?\.py:\d+: \w*Warning: ?(?:.*:)?$")
#: The beginning of a traceback, of which the text may show only a part.
_TRACEBACK: Final = "Traceback (m"
#: A line that a notebook draws, also between two exceptions of one chain.
_RULE: Final = "-" * 20
_CHAIN: Final = (
    "During handling of the above exception", "The above exception was the direct cause",
)  # fmt: skip
#: After these words, NCCL's own reason is in the next line.
_NCCL_REASON: Final = "Last error:"
_LONGEST_STACK: Final = 60
#: The name of an error in any form: it ends a traceback.
_NAMED: Final = re.compile(r"[\w.]*[A-Z.][\w.]*:?$|[A-Za-z_][\w.]*: ")
#: Lines of one frame, or a part of it, after the last whole frame of a torn traceback.
_FRAGMENT: Final = 3
#: The number of runs at each end of a log whose facts are kept.
_RUNS: Final = 16
#: Events whose lines are compared with the rows, as are lines without an event.
_ASKED: Final = (*OF_LAUNCH, CheckFailed, CudaError, LegacyCuda, NcclError, PythonError)
#: Events whose message a terminal may break into several lines, and the most further lines.
_MESSAGES: Final = (KnownMessage, PythonError, TorchMemory)
_WRAPPED: Final = 6
#: More events of one kind add nothing: a living engine prints some for each request.
_ENOUGH: Final = 50_000


class LogFacts:
    """The facts of one run; ``waits`` counts the "out of memory at" lines since the last progress.

    ``lines`` and ``subject`` are those of the whole log.
    """

    def __init__(self) -> None:
        self.lines = 0
        self.marks: list[LogEvent] = []
        self.subject = FactCollector()
        self.course = Course()
        self.deaths = EventFinder()
        self.mood = Mood()
        self.told = ToldLines()
        #: The line in which an engine begins.
        self.begun_at: int | None = None
        #: Whether the log contains the command that was run.
        self.commanded = False
        #: The last line of a traceback whose error has not come yet.
        self.unfinished: LogEvent | None = None
        #: The first exception of a clean-up.
        self.clean_up: LogEvent | None = None
        self.waits = 0
        self.waiting: LogEvent | None = None
        #: The number of rows outside tracebacks, and of events that are no source lines of one: a
        #: chain of exceptions counts once.
        self.rows_beside = 0
        self.errors = 0
        self._stack: list[PythonFrame] = []
        #: Whether the previous row is a frame, whose source line comes next.
        self._at_frame = False
        #: Whether frames follow the message to which they belong.
        self._followed = False
        #: The last line in which the exception of a destructor may come.
        self._ignored_until = 0
        self._table = SmiTable()
        #: The place in `marks` of a message that may continue, and the ways to join its lines.
        self._message: tuple[int, list[str]] | None = None
        self._counts: dict[type, int] = {}
        #: Words of the previous row, of a warning or of NCCL, to which this row's message belongs.
        self._before = ""

    def take(self, line: int, text: str) -> None:
        self.lines = max(self.lines, line)
        self.subject.notice(text)
        self._begin(line, text)
        self.mood.notice(line, text)
        self.told.notice(line, text)
        repeated = repeats(text)
        if repeated is not None:
            self.waits += repeated if self.waits else 0
            return
        text, event, hits = self._read(text)
        if isinstance(event, Backpressure):
            self._wait(line, text, event)
            return
        if self._message and not self._continues(line, text, event):
            self._message = None
        at_frame, self._at_frame = self._at_frame, isinstance(event, PythonFrame)
        if isinstance(event, PythonFrame):
            self._frame(event)
            self.unfinished = LogEvent(line, text, event, tuple(self._stack))
        else:
            self._line(line, text, event, hits, self._call(text, event, at_frame=at_frame))

    def ended_by(self, text: str) -> bool:
        """Whether a row begins a second run: the engine had reached its cache, or was dying."""
        past = self.course.reached in ("cache", "warm-up", "serving")
        past = past or self.course.stage == "dying"
        return past and _may_begin(text) and _BEGINS.search(text) is not None

    @property
    def cut_at(self) -> LogEvent | None:
        """The last line of a traceback that ends the log before its error; None otherwise."""
        mark = self.unfinished
        return mark if mark and self.lines - mark.line <= _FRAGMENT else None

    def first(self, kind: type[_T]) -> LogEvent | None:
        return next((mark for mark in self.marks if isinstance(mark.event, kind)), None)

    def first_event(self, kind: type[_T]) -> _T | None:
        return next((event for _, event in self.every(kind)), None)

    def every(self, kind: type[_T]) -> list[tuple[LogEvent, _T]]:
        return [(mark, mark.event) for mark in self.marks if isinstance(mark.event, kind)]

    @property
    def session_limit(self) -> int | None:
        """Tokens of the longest request that the engine accepts; None if the log does not say."""
        return next((event.session for _, event in self.every(Starting) if event.session), None)

    @property
    def longest_warmup(self) -> int:
        """Tokens of the longest announced warm-up request that the engine accepts, else 0."""
        warmup, limit = self.first_event(WarmupLengths), self.session_limit
        lengths = warmup.lengths if warmup else ()
        return max((length for length in lengths if limit is None or length <= limit), default=0)

    def _begin(self, line: int, text: str) -> None:
        if self.begun_at is None and _may_begin(text) and _BEGUN.search(text):
            self.begun_at = line
            self.course.start()
        self.commanded = self.commanded or _COMMAND.match(text) is not None

    def _read(self, text: str) -> tuple[str, Struct | None, tuple[Hit, ...]]:
        """A row's text, event and hits; the text begins with the previous row's related words."""
        if self._before == _NCCL_REASON:
            text = f"{_NCCL_REASON} {text}"
        event = read_line(text)
        hits = hits_of(text) if event is None or isinstance(event, _ASKED) else ()
        event = self._event(text, event, hits)
        if isinstance(event, KnownMessage) and self._before:
            text = text if self._before == _NCCL_REASON else f"{self._before} {text}"
        warns = text if "Warning" in text and _WARNS_BELOW.match(text) else ""
        self._before = _NCCL_REASON if text.strip() == _NCCL_REASON else warns
        return text, event, hits

    def _event(self, text: str, event: Struct | None, hits: tuple[Hit, ...]) -> Struct | None:
        """The event of a row: its own, an entry of nvidia-smi's table, or a known message."""
        if event is not None and not isinstance(event, (*OF_LAUNCH, PythonError)):
            return event
        known = KnownMessage() if hits else None
        return self._table.line(text) or known or (None if isinstance(event, OF_LAUNCH) else event)

    def _wait(self, line: int, text: str, event: Backpressure) -> None:
        if event.cause == "memory":
            self.waits += 1
            self.waiting = self.waiting or LogEvent(line, text, event)

    def _frame(self, frame: PythonFrame) -> None:
        self._stack.append(frame)
        if self._followed:
            mark = self.marks[-1]
            self._exchange(len(self.marks) - 1, mark._replace(stack=(*mark.stack, frame)))

    def _call(self, text: str, event: Struct | None, *, at_frame: bool) -> str:
        """The source line of the frame above; empty if the row is no source line."""
        call = _CALL.match(text) if self._stack else None
        if at_frame and event is None and not call:
            call = _UNINDENTED.match(text)
        return call[1] if call else ""

    def _line(
        self, line: int, text: str, event: Struct | None, hits: tuple[Hit, ...], call: str
    ) -> None:
        self._count_beside(text, call)
        if text.startswith("Exception ignored") and _IN_DESTRUCTOR.match(text):
            self._ignored_until = line + _LONGEST_STACK
        if line <= self._ignored_until and isinstance(event, KnownMessage | PythonError):
            self.mood.complain(LogEvent(line, text, KnownMessage(), tuple(self._stack)))
            self._ignored_until, self._stack = 0, []
        elif event is not None and not (call and self._is_code(event)):
            self._keep(line, text, event, hits)
        elif call:
            self._code(line, call)
        elif not self.told.has(line) and self.mood.goes_on(line, text, tuple(self._stack)):
            self.deaths.progressed(line)
        if _TRACEBACK in text:
            self._open_traceback()
            self.unfinished = LogEvent(line, text, KnownMessage())
        elif self.unfinished and not call and self._ends(line, text, event):
            self.unfinished = None
        self.subject.read(line, text)

    def _ends(self, line: int, text: str, event: Struct | None) -> bool:
        """Whether a row is the error of a traceback, or a program's line after it."""
        return event is not None or bool(_NAMED.match(text)) or self.mood.told_at(line)

    def _is_code(self, event: Struct) -> bool:
        """Whether a known message is the source line of the last frame, which has none yet."""
        return isinstance(event, KnownMessage) and not self._stack[-1].code

    def _count_beside(self, text: str, call: str) -> None:
        if text.startswith(_CHAIN):
            self.rows_beside -= 1
            self.errors -= 1
        elif not (call or _TRACEBACK in text or text.startswith(_RULE)):
            self.rows_beside += 1

    def _open_traceback(self) -> None:
        """Begin a stack; many frameworks print the message first, and its traceback after it."""
        self._stack.clear()
        last = self.marks[-1] if self.marks else None
        self._followed = last is not None and isinstance(last.event, TorchMemory) and not last.stack

    def _continues(self, line: int, text: str, event: Struct | None) -> bool:
        """Join a message that a terminal broke; returns whether this line may be a part of it.

        A break may have been inside a word or in place of a space, so both are tried.
        """
        assert self._message is not None
        index, so_far = self._message
        mark = self.marks[index]
        if line - mark.line > _WRAPPED or event is not None:
            return False
        joined = [start + between + text.strip() for start in so_far for between in (" ", "")]
        self._message = (index, joined)
        if isinstance(mark.event, TorchMemory):
            memory = torch_memory(joined[0])
            if memory.figures > mark.event.figures:
                self._exchange(index, mark._replace(event=memory))
            return True
        best, hits = max(
            ((text, hits_of(text)) for text in joined), key=lambda x: told_figures(x[1])
        )
        if told_figures(hits) > told_figures(mark.hits):
            self._exchange(index, mark._replace(event=KnownMessage(), text=best, hits=hits))
        return True

    def _exchange(self, index: int, mark: LogEvent) -> None:
        self.deaths.replace(self.marks[index], mark)
        self.marks[index] = mark

    def _code(self, line: int, text: str) -> None:
        last = self._stack[-1]
        if not last.code and not text.startswith(("^", "~")):
            self._stack[-1] = PythonFrame(path=last.path, function=last.function, code=text)
            self.unfinished = LogEvent(line, text, KnownMessage(), tuple(self._stack))
            self.mood.refuse(self.unfinished)

    def _keep(self, line: int, text: str, event: Struct, hits: tuple[Hit, ...]) -> None:
        self._followed = False
        self.errors += not text.startswith(" ")
        kind = type(event)
        self._counts[kind] = self._counts.get(kind, 0) + 1
        if self._counts[kind] > _ENOUGH:
            return
        stacked = isinstance(event, TorchMemory | PythonError | LegacyCuda | KnownMessage)
        time = _TIME.match(text)
        mark = LogEvent(
            line, text, event, tuple(self._stack) if stacked else (), time[1] if time else "", hits
        )
        if self._stack and not text.startswith(" "):
            self._stack = []
        if isinstance(event, KnownMessage | PythonError) and mark.cleans_up:
            self.clean_up = self.clean_up or mark
            return
        if isinstance(event, _MESSAGES):
            self._message = (len(self.marks), [text])
        if not isinstance(event, ServerFigures):
            self.waits, self.waiting = 0, None
        self.course.take(event, mark.time)
        self.deaths.take(mark)
        self.marks.append(mark)


@by_form
def _may_begin(form: str) -> bool:
    return any(map(form.__contains__, _BEGINNINGS))


def read_runs(rows: Iterable[Row]) -> list[LogFacts]:
    """Return the facts of each run of an engine in a whole log, in order.

    If an engine restarts again and again, only the first and the last runs are kept.
    """
    runs = [LogFacts()]
    for row in rows:
        if runs[-1].ended_by(row.text):
            again = LogFacts()
            again.subject, again.told = runs[-1].subject, runs[-1].told
            runs.append(again)
        runs[-1].take(row.line, row.text)
        if row.program:
            runs[-1].subject.foreign.found(row.program)
    _share_machine(runs)
    return runs if len(runs) <= 2 * _RUNS else [*runs[:_RUNS], *runs[-_RUNS:]]


def _share_machine(runs: list[LogFacts]) -> None:
    """Give each run the facts of all runs about the machine."""
    if len(runs) == 1:
        return
    machine = [mark for run in runs for mark in run.marks if isinstance(mark.event, OF_MACHINE)]
    for run in runs:
        others = [mark for mark in run.marks if not isinstance(mark.event, OF_MACHINE)]
        run.marks = sorted((*others, *machine), key=lambda mark: mark.line)
        run.lines = runs[-1].lines
