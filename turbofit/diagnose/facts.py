"""Reads a log once, and collects the facts of each run of an engine, with their lines."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Final, TypeVar

from turbofit.diagnose.event import EventFinder, LogEvent
from turbofit.diagnose.mood import Mood, sound_of, tells_of_error
from turbofit.diagnose.rules.causes import hits_of, may_be_known, told_figures
from turbofit.diagnose.stack import Stack, part_of
from turbofit.diagnose.subject import FactCollector, may_have_facts
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
    NoEvent,
    PythonError,
    PythonFrame,
    ServerFigures,
    Starting,
    TorchMemory,
    WarmupLengths,
)
from turbofit.observe.log_reader import LONGEST_FORM, event_in, form_of, may_be_event, torch_memory
from turbofit.observe.stages import Course

if TYPE_CHECKING:
    from collections.abc import Iterable

    from turbofit.core.struct import Struct
    from turbofit.diagnose.rows import Row
    from turbofit.diagnose.stack import Part
    from turbofit.observe.log_reader import Form

_TIME: Final = re.compile(r"\[TM\]\[[A-Z]+\]\[(\d{4}\.[\d:.]+)\]")
_T = TypeVar("_T", bound="Struct")
#: The beginning of an engine: its command, its progress bars, and its lines before the weights.
_BEGUN: Final = (
    "lmdeploy serve", "lmdeploy chat", "api_server", "turbofit ", "pipeline(", "Loading",
    "max_context_token_num",
)  # fmt: skip
#: Lines that only an engine which is started again prints again.
_BEGINS_AGAIN: Final = re.compile(
    r"\blmdeploy (?:serve|chat) |\bturbofit serve |\bLoading[\w ]*: +0%|max_context_token_num"
).search
#: A command that somebody ran, with or without a shell's prompt.
_COMMAND: Final = re.compile(
    r"[$#>] \w|(?:lmdeploy|docker|podman|python[\d.]*|torchrun|accelerate) +[\w./-]+ "
).match
#: A comment in code, and a whole line of one or a heading: no step of Docker (#12), and no heading
#: that is the message. A report's title is among the first rows.
_REMARK: Final = "  # "
_COMMENT: Final = re.compile(r"\s*#+ *(?!(?:\w+\.)*\w*(?:Error|Exception)\b)(?:[^\W\d]|\W{1,4}$)")
#: A Python warning whose text is missing, or ends with a colon.
_WARNS_BELOW: Final = re.compile(r".{0,240}?\.py:\d+: \w*Warning: ?(?:.*:)?$")
#: After these words, NCCL's own reason is in the next line.
_NCCL_REASON: Final = "Last error:"
#: Lines of one frame, or a part of it, after the last whole frame of a torn traceback.
_FRAGMENT: Final = 3
#: The number of runs at each end of a log whose facts are kept.
_RUNS: Final = 16
#: Events whose lines are compared with the rows, as are lines without an event.
_ASKED: Final = (*OF_LAUNCH, CheckFailed, CudaError, LegacyCuda, NcclError, PythonError)
_NO_EVENT: Final = NoEvent()
#: Events that words of a row may replace.
_WEAK: Final = (*OF_LAUNCH, PythonError)
#: Events whose traceback comes before them.
_RAISED: Final = (TorchMemory, PythonError, LegacyCuda, KnownMessage)
#: Events whose message a terminal may break into several lines, and the most further lines.
_MESSAGES: Final = (KnownMessage, PythonError, TorchMemory)
_WRAPPED: Final = 6
#: The most forms of rows that tell nothing that are remembered.
_FORMS: Final = 4096
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
        #: The first exception of a clean-up.
        self.clean_up: LogEvent | None = None
        self.waits = 0
        self.waiting: LogEvent | None = None
        #: The number of rows outside tracebacks, and of events that are no source lines of one: a
        #: chain of exceptions counts once.
        self.rows_beside = 0
        self.errors = 0
        self._stack = Stack()
        #: Whether frames follow the message to which they belong.
        self._followed = False
        self._table = SmiTable()
        #: The place in `marks` of a message that may continue, and the ways to join its lines.
        self._message: tuple[int, list[str]] | None = None
        self._counts = Counter[type]()
        #: Forms of rows that tell nothing and came before.
        self._plain: set[str] = set()
        #: Words of the previous row, of a warning or of NCCL, to which this row's message belongs.
        self._before = ""

    def take(self, line: int, text: str, form: Form) -> None:
        """Read a row; the second one of a form that tells nothing is only counted."""
        if form.text in self._plain and not self._goes_on:
            self._count(line, text, form)
            return
        new = self.told.title_is_past and len(self._plain) < _FORMS
        kept = len(form.text) <= LONGEST_FORM
        if new and kept and form.ask(is_plain) and not self.subject.foreign.named_in(form):
            self._plain.add(form.text)
        self._take(line, text, form)

    @property
    def _goes_on(self) -> bool:
        """Whether the next row may belong to a traceback, a message or a report."""
        return bool(
            self._stack.frames
            or self._stack.open
            or self._message
            or self._before
            or self.told.title
        )

    def _count(self, line: int, text: str, form: Form) -> None:
        self.lines = max(self.lines, line)
        self.rows_beside += 1
        self.mood.notice(line, text)
        self.subject.cards.read(line, text)
        if form.ask(sound_of) == "progress":
            self.deaths.progressed(line)

    def _take(self, line: int, text: str, form: Form) -> None:
        self._notice(line, text, form)
        repeated = repeats(text)
        if repeated is not None:
            self.waits += repeated if self.waits else 0
            return
        mark, form = self._read(line, text, form)
        if isinstance(mark.event, Backpressure):
            self._wait(mark, mark.event)
        elif isinstance(mark.event, PythonFrame):
            self._frame(mark, mark.event)
        else:
            self._line(mark, form)
            self.subject.read(line, mark.text, form)

    def ended_by(self, text: str, form: Form) -> bool:
        """Whether a row begins a second run: the engine had reached its cache, or was dying."""
        past = self.course.reached in ("cache", "warm-up", "serving")
        past = past or self.course.stage == "dying"
        # In a form 0% stands for any percentage of one digit, so the text is asked, too.
        return past and form.ask(_BEGINS_AGAIN) is not None and _BEGINS_AGAIN(text) is not None

    @property
    def cut_at(self) -> LogEvent | None:
        """The last line of a traceback that ends the log before its error; None otherwise."""
        mark = self._stack.open
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

    def _notice(self, line: int, text: str, form: Form) -> None:
        """Read any row for what it says of the whole log."""
        self.lines = max(self.lines, line)
        self.told.notice(line, text)
        self.subject.notice(text, form, by_person=self.told.has(line))
        if self.begun_at is None and form.ask(_begins):
            self.begun_at = line
            self.course.start()
        self.commanded = self.commanded or form.ask(_COMMAND) is not None
        self.mood.notice(line, text)

    def _read(self, line: int, text: str, form: Form) -> tuple[LogEvent, Form]:
        """A row with its event and hits, after the previous row's words that belong to it."""
        before, self._before = self._before, text if form.ask(_goes_on_below) else ""
        if before == _NCCL_REASON:
            text = f"{before} {text}"
            form = form_of(text)
        event = event_in(text, form)
        known = event is None or isinstance(event, _ASKED)
        heading = self.told.title_is_past and _COMMENT.match(text)
        quoted = "" if heading else text.partition(_REMARK)[0]
        hits = hits_of(quoted, form) if known else ()
        if event is None or isinstance(event, _WEAK):
            weak = event if isinstance(event, PythonError) else _NO_EVENT
            event = self._table.line(text) or (KnownMessage() if hits else weak)
        if before and isinstance(event, KnownMessage) and before != _NCCL_REASON:
            text = f"{before} {text}"
        return LogEvent(line, text, event, self._stack.frames, hits=hits), form

    def _wait(self, mark: LogEvent, event: Backpressure) -> None:
        if event.cause == "memory":
            self.waits += 1
            self.waiting = self.waiting or mark

    def _frame(self, mark: LogEvent, frame: PythonFrame) -> None:
        self._message = None
        self._stack.push(mark, frame)
        if self._followed:
            last = self.marks[-1]
            self._exchange(len(self.marks) - 1, last._replace(stack=(*last.stack, frame)))

    def _line(self, mark: LogEvent, form: Form) -> None:
        """Read a row that is no frame: a source line, an event, or words."""
        part, call = form.ask(part_of), self._stack.call_in(mark)
        if call:
            self.mood.refuse(self._stack.add_code(mark, call))
        elif isinstance(mark.event, NoEvent):
            self._words(mark, form)
        else:
            self._event(mark)
        if part in ("head", "destructor"):
            self._open_traceback(mark, part)
        elif self._stack.open and not call:
            self._stack.end(mark, self.mood.logged)
        self._count_beside(part, call)

    def _count_beside(self, part: Part, call: str) -> None:
        if part == "chain":
            self.rows_beside -= 1
            self.errors -= 1
        elif not (call or part in ("head", "rule")):
            self.rows_beside += 1

    def _open_traceback(self, mark: LogEvent, part: Part) -> None:
        """Begin a stack; many frameworks print the message first, and its traceback after it."""
        self._stack.begin(LogEvent(mark.line, mark.text), in_destructor=part == "destructor")
        last = self.marks[-1] if self.marks else None
        self._followed = last is not None and isinstance(last.event, TorchMemory) and not last.stack

    def _words(self, mark: LogEvent, form: Form) -> None:
        """Read a row without an event: more of the last message, or what the program reports."""
        if self._message:
            self._message = self._joined(mark, *self._message)
        if not self.told.has(mark.line) and self.mood.goes_on(mark, form):
            self.deaths.progressed(mark.line)

    def _joined(
        self, mark: LogEvent, index: int, so_far: list[str]
    ) -> tuple[int, list[str]] | None:
        """Join a message that a terminal broke; None if this row is too far below it.

        A break may have been inside a word or in place of a space, so both are tried.
        """
        whole = self.marks[index]
        if mark.line - whole.line > _WRAPPED:
            return None
        joined = [start + between + mark.text.strip() for start in so_far for between in (" ", "")]
        if isinstance(whole.event, TorchMemory):
            memory = torch_memory(joined[0])
            if memory.figures > whole.event.figures:
                self._exchange(index, whole._replace(event=memory))
            return index, joined
        best, hits = max(
            ((text, hits_of(text)) for text in joined), key=lambda found: told_figures(found[1])
        )
        if told_figures(hits) > told_figures(whole.hits):
            self._exchange(index, whole._replace(event=KnownMessage(), text=best, hits=hits))
        return index, joined

    def _exchange(self, index: int, mark: LogEvent) -> None:
        self.deaths.replace(self.marks[index], mark)
        self.marks[index] = mark

    def _event(self, mark: LogEvent) -> None:
        """Keep an event, unless the program survived it or was ending; it ends a traceback."""
        self._message, self._followed = None, False
        self.errors += not mark.text.startswith(" ")
        self._counts[type(mark.event)] += 1
        if self._counts[type(mark.event)] > _ENOUGH:
            return
        if mark.stack and not isinstance(mark.event, _RAISED):
            mark = mark._replace(stack=())
        if not mark.text.startswith(" "):
            self._stack.clear()
        if isinstance(mark.event, KnownMessage | PythonError) and mark.cleans_up:
            self.clean_up = self.clean_up or mark
        else:
            self._keep(mark)

    def _keep(self, mark: LogEvent) -> None:
        if time := _TIME.match(mark.text):
            mark = mark._replace(time=time[1])
        if isinstance(mark.event, _MESSAGES):
            self._message = (len(self.marks), [mark.text])
        if not isinstance(mark.event, ServerFigures):
            self.waits, self.waiting = 0, None
        self.course.take(mark.event, mark.time)
        self.deaths.take(mark)
        self.marks.append(mark)


def _begins(form: str) -> bool:
    return any(map(form.__contains__, _BEGUN))


def _goes_on_below(form: str) -> bool:
    """Whether the text of a warning, or NCCL's reason, is in the next row."""
    if "Warning" in form:
        return _WARNS_BELOW.match(form) is not None
    return form.strip() == _NCCL_REASON


def is_plain(form: str) -> bool:
    """Whether a second row of this form tells nothing new, as most rows of a server."""
    may_tell = (
        tells_of_error, part_of, _goes_on_below, may_be_event, may_be_known, may_have_facts
    )  # fmt: skip
    of_block = form[:1].isspace() or form.startswith(("|", "#"))
    return not (of_block or any(question(form) for question in may_tell))


def read_runs(rows: Iterable[Row]) -> list[LogFacts]:
    """Return the facts of each run of an engine in a whole log, in order.

    If an engine restarts again and again, only the first and the last runs are kept.
    """
    runs = [LogFacts()]
    for row in rows:
        form = form_of(row.text)
        if runs[-1].ended_by(row.text, form):
            again = LogFacts()
            again.subject, again.told = runs[-1].subject, runs[-1].told
            runs.append(again)
        runs[-1].take(row.line, row.text, form)
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
