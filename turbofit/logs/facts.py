"""Reads a log once, line by line, and keeps the events of each run of an engine.

A line that reports trouble may be the cause of the end until a later line rules it out. A later
line does so if it shows that the engine became ready, or that the program made progress.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from functools import cached_property
from itertools import chain, takewhile
from typing import Final, Literal, NamedTuple, TypeVar

from msgspec.structs import replace

from turbofit.core.struct import Struct
from turbofit.logs import log_events as events
from turbofit.logs.causes import END, Hit, hits_of
from turbofit.logs.log_events import (
    FATAL,
    OF_LAUNCH,
    OF_MACHINE,
    KnownMessage,
    NoEvent,
    PythonError,
    PythonFrame,
)
from turbofit.logs.log_reader import Form, LogLine, event_in, form_of
from turbofit.logs.subject import Subject
from turbofit.machine.nvidia_smi import SmiTable
from turbofit.machine.torch_memory import TorchMemory, torch_memory

_T = TypeVar("_T", bound=Struct)
#: What a line is. ``head``: the first line of a traceback. ``late head``: the first line of a
#: traceback that follows torch's message. ``chain``: a line between two exceptions. ``frame``,
#: ``code``: a frame and its source line. ``event``: a line with an event. ``destructor``: a line
#: that names a failed destructor. ``words``: any other line.
Part = Literal[
    "head", "late head", "chain", "frame", "code", "event", "destructor", "words",
]  # fmt: skip
#: Where the reader is. ``log``: outside of tracebacks. ``traceback``: between two frames.
#: ``frame``: behind a frame, before its source line. ``message``: behind an error, whose message
#: may go on. ``below``: in a traceback that follows its error. ``ignored``: in the traceback of a
#: failed destructor.
State = Literal["log", "traceback", "frame", "message", "below", "ignored"]
#: The state after a line, by the state before it and by what the line is; other lines keep the
#: state.
STATES: Final[dict[State, dict[Part, State]]] = {
    "log": {"head": "traceback", "late head": "traceback", "frame": "frame", "event": "message",
            "destructor": "ignored"},
    "traceback": {"frame": "frame", "event": "message"},
    "frame": {"code": "traceback", "words": "traceback", "head": "traceback",
              "late head": "traceback", "event": "message"},
    "message": {"head": "traceback", "late head": "below", "frame": "frame", "chain": "log",
                "destructor": "ignored"},
    "below": {"event": "message"},
    "ignored": {"event": "log"},
}  # fmt: skip
_OPEN: Final = ("traceback", "frame", "below")
#: The head of Ray's copy of an error: the call of an actor or a task in another process.
_COPIED: Final = re.compile(r"\bray::\w[\w.]*\(").search
#: How some lines without an event begin.
_BEGINNINGS: Final[tuple[tuple[Part, re.Pattern[str]], ...]] = (
    ("head", re.compile(r".*Traceback \(m")),
    ("chain", re.compile("During handling of the above exc|The above exception was the direct")),
    ("destructor", re.compile(r"Exception ignored (?:in|on)\b.{0,240}?(?:__del__|atexit|callb)")),
)
#: The last line of a traceback, by its form.
RAISED: Final = re.compile(r"(?:\w+\.){0,9}[A-Z]\w*(?:Error|Exception|Exit|Interrupt)(?:: |$)")
#: A line behind frames that may be an exception's: a dotted name alone, or before a colon.
_ENDS: Final = re.compile(r"(?:\w+\.){0,9}\w+(?:\([\w.]*\))?(?::(?!//)|$)")
#: The source line of a frame: indented or, in a notebook, after an arrow.
_CALL: Final = re.compile(r"(?:    |-+> \d+)\s*(.+)")
#: Lines that an engine prints once, at its start: a second such line shows another start.
_BEGINS_AGAIN: Final = re.compile(
    r"\blmdeploy (?:serve|chat) |\bturbofit serve |\bLoading[\w ]*: +0%|max_context_token_num"
).search
#: A command of a shell, perhaps behind its prompt and variables.
_COMMAND: Final = re.compile(
    r"\W{0,3}(?:[A-Z_]+=\S+ +){0,9}(?:\S{0,240}/)?"
    r"(?:lmdeploy|turbofit|swift|python[\d.]*|torchrun|accelerate) [\w./-]"
).match
#: The beginning of an engine: its command, or its progress bars.
_LOADS: Final = re.compile(
    r"lmdeploy (?:serve|chat)|api_server|turbofit |pipeline\(|Loading|max_context_token_num"
).search
#: The beginning of a comment behind code.
_REMARK: Final = "  # "
#: A line that is a comment or a heading. ``#12`` is neither: so Docker numbers its steps.
_COMMENT: Final = re.compile(
    r"\s*#+ *(?!(?:\w+\.)*\w*(?:Error|Exception)\b)(?:[^\W\d]|\[|\W{1,4}$)"
)
#: Lines whose sentence goes on in the next line: Python warnings without a text, NCCL's error.
_GOES_ON: Final = re.compile(r".{0,240}?\.py:\d+: \w*Warning: ?(?:.*:)?$|\s*Last error:\s*$")
#: A line that only warns: by Python's or a logger's prefix, or of a fallback or a retry.
_WARNS: Final = re.compile(
    r"\S*\.py:\d+: \w*Warning: |\W*(?:INFO|DEBUG|WARN(?:ING)?)\b"
    r"|.{0,240}?(?:\bWARNING\b|[a-z]Warning: |\b[Ff]all(?:s|ing)?[ -]?back|\b[Rr]etrying\b)"
)
#: The form of a line without an event that reports an error.
_COMPLAINT: Final = re.compile(
    r"(?!#|- \[|.{0,60}?\b(?:INFO|DEBUG|WARN(?:ING)?|NOTICE|info|debug|warn(?:ing)?|notice)\b"
    r"|.{0,240}?Warning:|.*\blog[-_]level|.*following error\W*$|.*operation scheduled before its"
    r"|.*exception caught:(?: GeneratorExit| CancelledError)? *$)"
    r".*(?:\b(?:[Ee]rror|ERROR|FATAL|[Ff]atal|CRITICAL|[Ff]ailed|Aborted|Killed|denied|refused"
    r"|Segmentation)\b(?!.*:$)|NCCL WARN|NVRM:.{0,240}?(?:failed|error|Xid|mismatch))"
).match
#: The form of a line that shows progress: a logger's INFO, or a progress bar.
_PROGRESS: Final = re.compile(
    r"(?i:(?!.*(?:shut|exit|terminat|kill|clean|stop|retry|http/|nccl info|throughput)))"
    r"(?:.{0,60}?\bINFO\b|.{0,200}?\d%\|)"
).match
#: The level of a logger's line that reports an error.
_SEVERE: Final = re.compile(r"(?:\d|\W) - (?:ERROR|CRITICAL|FATAL) - ").search
#: Words of a person who tells of a program that stands still.
_HANGS: Final = re.compile(
    r"卡住|卡死|死锁|无响应|没有(?:任何)?[响相]应|(?i:\b(?:hangs?|hung|hanging|stuck|unresponsive"
    r"|(?:stops?|stopped|not|n't) respond(?:s|ing)?)\b)"
).search
#: Words that speak of a trouble in general, or deny it, or tell of the host's memory.
_PERHAPS: Final = re.compile(
    r"(?i:\b(?:if|may|might|could|causes?|avoid|prevent|fix|whether|possible|how to)\b"
    r"|(?:\bnot?|n't|\bnever|\bno longer) (?:\w+ )?(?:stuck|hang|hung|oom|out of)"
    r"|oom.?kill|\bram\b|(?:host|system|cpu) memory|内存|如果|避免|防止|会不会|没有爆|响应头)"
).search
#: Signs of a program's line, which no sentence of a person has: an exception's name, a logger's
#: level, a source line, a command, torch's figures, or the words of a shell or of the kernel alone.
OF_PROGRAM: Final = re.compile(
    r"\w(?:Error|Exception|Warning|Exit|Interrupt)\b|Traceback|[Ee]rrno|\[[\w.: ]+\]|\w\.\w+:\d"
    r"|\b(?:ERROR|FATAL|CRITICAL|WARNING|INFO|NVRM)\b|\bline \d|\bpython3? (?:-|\S+\.py\b)"
    r"|\blmdeploy (?:serve|chat|lite|convert|check_env)\b"
    r"|\w: (?:error|fatal|warning|exec)|Tried to allocate|(?im:^\W*(?:\w+\.\w+: )?(?:error|killed"
    r"|aborted|segmentation|illegal|bus|(?:cuda |gpu )?out of memory|oom|fatal|exec|what\(\))\b)"
).search
#: A lack of memory in words alone.
_IN_WORDS: Final = re.compile(
    r"(?i:out of (?:gpu |cuda )?memory|(?<![a-z_])oom(?![a-z_]))"
    r"|显存.?(?:不足|不够|溢出|爆|炸)|[爆炸超]了?显存"
).search
#: A count of failures that is 0.
_NONE_OF_THEM: Final = re.compile(
    r"(?i:\b(?:\w+ )?(?:failed|failures?|errors?|refused|rejected)(?: requests?)?"
    r"\W{1,12}0(?:\.0+)?\b"
    r"|\b(?:0|no) (?:\w+ )?(?:failed|failures?|errors?|refused))(?![\w.])"
)
#: A request that a server refused, except for a missing key or a wrong route.
_REFUSED: Final = re.compile(r'"POST /\S{0,240} HTTP/[\d.]+" (?:4(?!0[1345])|5)\d\d\b').search
#: The time in a line of TurboMind. Lines with an earlier time may stand behind a fatal line.
_TIME: Final = re.compile(r"\[TM\]\[[A-Z]+\]\[(\d{4}\.[\d:.]+)\]")
#: Words of faults that no process survives: its CUDA context or its communicator is lost.
_NEVER_OUTLIVED: Final = ("CUDA error", "CUDA runtime error", "[TM][FATAL]", "NCCL")
#: Kinds of troubles of the machine. A warning of these kinds is an answer, from any program.
_MACHINE: Final = (
    "no_gpu", "driver_too_old", "driver_mismatch", "gpu_too_new", "gpu_too_old", "no_kernel_image",
    "gpu_lost", "shared_memory", "disk_full", "ray_waits", "virtual_gpu", "virtual_gpu_memory",
)  # fmt: skip
#: Events whose lines are compared with the rows of `presets/causes.yaml`.
_ASKED: Final = (*OF_LAUNCH, *FATAL)
#: Events that give way to a row of `presets/causes.yaml`, except if they report a lack of memory.
#: If no row matches, a `PythonError` stays the line's event, and the other events are dropped.
_WEAK: Final = (*OF_LAUNCH, PythonError)
#: Events that may be the reason for an end.
_RAISES: Final = (*FATAL, KnownMessage, events.NoCache)
#: ``_WRAPPED``: the most lines of a message behind its first line. ``_RUNS``: the most runs that
#: are kept from the beginning of a log, and as many from its end.
_WRAPPED, _RUNS = 6, 16


class LogEvent(NamedTuple):
    """An event and the line that contains it.

    ``stack`` has the Python frames before the line, the innermost last. ``hits`` are the rows of
    `presets/causes.yaml` that match the line. ``after``: the number of the line with the exception
    that Python handled when it raised this exception; 0 if there is none. ``copied``: Ray repeats
    here what another process printed.
    """

    line: int
    text: str
    event: Struct = NoEvent()
    stack: tuple[PythonFrame, ...] = ()
    hits: tuple[Hit, ...] = ()
    after: int = 0
    copied: bool = False

    @property
    def kind(self) -> str:
        return self.hits[0].row.kind if self.hits else ""

    @property
    def short(self) -> bool:
        """Whether the line reports a lack of GPU memory."""
        of_memory = isinstance(self.event, TorchMemory | events.NoCache)
        return of_memory or getattr(self.event, "out_of_memory", False)

    @property
    def is_severe(self) -> bool:
        """Whether a logger calls the line an error."""
        return _SEVERE(self.text) is not None

    @property
    def is_notice(self) -> bool:
        """Whether the line is harmless by its row in `presets/causes.yaml`."""
        harmless = ("notice", "remark")
        return isinstance(self.event, KnownMessage) and self.hits[0].row.rank in harmless


class LogFacts:
    """The facts of one run.

    ``marks`` has the events of the run. ``subject``, and ``machine`` with the events about the
    machine, are of the whole log.
    """

    def __init__(self, subject: Subject, machine: list[LogEvent]) -> None:
        self.subject, self.machine = subject, machine
        self.marks: list[LogEvent] = []
        self.state: State = "log"
        #: The number of the line in which an engine begins.
        self.begun_at: int | None = None
        #: The number of the first line that is a command.
        self.command_at: int | None = None
        #: The first "out of memory at" line since the last event.
        self.waiting: LogEvent | None = None
        #: The last line without an event that reports an error, by its form or in words.
        self.complaint: LogEvent | None = None
        #: The last frame of a traceback whose error is in no line: the log was cut there.
        self.cut: LogEvent | None = None
        #: Whether a person's words tell of a program that stands still.
        self.told_still = False
        #: The last line of the log so far.
        self.last: LogEvent | None = None
        #: Numbers of lines that show progress. With two such lines after an error, the program has
        #: survived this error.
        self._progress: list[int] = []
        #: The frames of the traceback that is being read, the innermost last.
        self._stack: tuple[PythonFrame, ...] = ()
        #: The number of the line with the exception that Python handled; 0 outside of a chain.
        self._handled = 0
        #: Whether the traceback that is being read began with its head.
        self._headed = False
        #: Whether the traceback that is being read is Ray's copy of another process's.
        self._copied = False
        self._table = SmiTable()
        #: The possible texts of torch's message if the message has several lines.
        self._message: list[str] = []
        #: The line before this line if its sentence goes on in this line; else empty.
        self._before = ""

    def take(self, line: int, text: str, form: Form) -> None:
        """Read one line of the log."""
        self.subject.lines, self.last = line, LogEvent(line, text)
        if self.state == "message" and line - self.marks[-1].line > _WRAPPED:
            self.state = "log"
        self.subject.notice(text, form)
        self._note_begin(line, text, form)
        before, self._before = self._before, text if form.ask(_GOES_ON.match) else ""
        if before and event_in(text, form) is None:
            text = f"{before} {text}"
            form = form_of(text)
        mark = self._mark(line, text, form)
        if isinstance(mark.event, events.Answered):
            if not self.first(events.Answered):  # one answer proves that the server served
                self._keep(mark)
            return
        if isinstance(mark.event, events.Backpressure):
            if mark.event.cause == "memory":
                self.waiting = self.waiting or mark
            return
        self._copied = self._copied or form.ask(_COPIED) is not None
        part = self._part(mark, form)
        self._note_cut(mark, part)
        self.state = STATES[self.state].get(part, self.state)
        if isinstance(mark.event, PythonFrame):
            self.subject.read_frame(mark.event.path, text, form)
        elif not isinstance(mark.event, events.ServerFigures):
            self.subject.read(line, text, form)

    def begins_next_run(self, text: str, form: Form) -> bool:
        """Return whether a line starts the engine again, after this run made its cache or died."""
        past = (events.CacheBudget, events.Slab, events.KvBlocks, events.WarmingUp,
                events.WarmupFinished, events.ServerUp, events.Answered, events.CudaError,
                events.LegacyCuda, events.CheckFailed)  # fmt: skip
        # 0% in a form is any percentage of one digit: only the text itself shows 0%.
        begins = form.ask(_BEGINS_AGAIN) is not None and _BEGINS_AGAIN(text) is not None
        return begins and any(isinstance(mark.event, past) for mark in self.marks)

    @cached_property
    def fatal(self) -> list[LogEvent]:
        """The lines with errors that may have ended the run, and the lines with harmless notices.

        If all errors say that torch finds no GPU, all warnings count, since a warning names the
        reason. Without an error only warnings about the machine count.
        """
        fatal: list[LogEvent] = []
        warned: list[LogEvent] = []
        for mark in self.marks:
            if isinstance(mark.event, events.ServerUp | events.WarmupFinished):
                fatal, warned = [], []
            elif isinstance(mark.event, _RAISES) and not mark.is_notice:
                if isinstance(mark.event, PythonError) or RAISED.match(mark.text):
                    fatal = [before for before in fatal if self._counts_until(before, mark.line)]
                in_words = isinstance(mark.event, KnownMessage | PythonError)
                warns = _WARNS.match(mark.text) and (in_words or ".py:" in mark.text)
                (warned if warns else fatal).append(mark)
        if all(mark.kind == "no_gpu" for mark in fatal):
            fatal += [mark for mark in warned if fatal or mark.kind in _MACHINE]
        notices = (mark for mark in self.marks if mark.is_notice)
        return sorted((*fatal, *notices), key=lambda mark: mark.line)

    @property
    def died(self) -> bool:
        return not all(mark.is_notice for mark in self.fatal)

    def first(self, kind: type[_T]) -> LogEvent | None:
        return next((mark for mark, _ in self.every(kind)), None)

    def first_event(self, kind: type[_T]) -> _T | None:
        return next((event for _, event in self.every(kind)), None)

    def every(self, kind: type[_T]) -> list[tuple[LogEvent, _T]]:
        both = chain(self.marks, self.machine)
        return [(mark, mark.event) for mark in both if isinstance(mark.event, kind)]

    def until(self, last: LogEvent) -> list[Struct]:
        """Return the events that `death` reads: the events before ``last``, then ``last``.

        Right before ``last`` come its Python frames, behind it the calls of its stack; other fatal
        events are left out. A line of TurboMind further down in the log counts as before ``last``
        if its time is not later.
        """
        place, died = self.marks.index(last), _TIME.match(last.text)
        before = [mark.event for mark in self.marks[:place] if not isinstance(mark.event, FATAL)]
        behind = self.marks[place + 1 :]
        if died:
            times = ((mark.event, _TIME.match(mark.text)) for mark in behind)
            before += [event for event, time in times if time and time[1] <= died[1]]
        calls = takewhile(lambda mark: isinstance(mark.event, events.Frame), behind)
        return [*before, *last.stack, last.event, *(mark.event for mark in calls)]

    def _note_begin(self, line: int, text: str, form: Form) -> None:
        """Note the first line that is a command, and the first in which an engine begins."""
        if self.command_at is None and form.ask(_COMMAND):
            self.command_at = line
        if self.begun_at is None and form.ask(_LOADS):
            self.begun_at = line
            self.marks.append(LogEvent(line, text, events.Starting()))

    def _note_cut(self, mark: LogEvent, part: Part) -> None:
        """Note a traceback without its error so far; any line that may be its error ends it."""
        if part in ("head", "late head"):
            self._headed, self.cut = part == "head", None
        elif part == "frame":
            self.cut = mark if self._headed else None
        elif part in ("event", "chain") or (part == "words" and _ENDS.match(mark.text)):
            self._headed, self.cut = False, None

    def _mark(self, line: int, text: str, form: Form) -> LogEvent:
        """Return a line with its event and its rows; a comment or a heading has none."""
        if form.ask(_COMMENT.match):
            return LogEvent(line, text)
        event = event_in(text, form)
        known = event is None or isinstance(event, _ASKED)
        hits = hits_of(text.partition(_REMARK)[0], form, self._stack) if known else ()
        short = getattr(event, "out_of_memory", False) or isinstance(event, events.NoCache)
        if event is None or (isinstance(event, _WEAK) and not short):
            other = event if isinstance(event, PythonError) else NoEvent()
            event = self._table.line(text) or (KnownMessage() if hits else other)
        return LogEvent(line, text, event, self._stack, hits)

    def _part(self, mark: LogEvent, form: Form) -> Part:
        """Return what a line is, as a part of a traceback or of the log, and store its content."""
        if isinstance(mark.event, PythonFrame):
            if self.state == "below":
                self.marks[-1] = self.marks[-1]._replace(stack=(*self.marks[-1].stack, mark.event))
            else:
                self._stack += (mark.event,)
            return "frame"
        for part, begins in _BEGINNINGS:
            if form.ask(begins.match):
                self._stack, last = (), self.marks[-1] if self.marks else mark
                if part == "chain":
                    self._handled = last.line
                # Many frameworks print torch's message first, and its traceback behind it.
                bare = isinstance(last.event, TorchMemory) and not last.stack
                return "late head" if part == "head" and bare else part
        silent = isinstance(mark.event, NoEvent | KnownMessage)
        if self.state in _OPEN and self._stack and silent and not self._stack[-1].code:
            call = _CALL.match(mark.text)
            if call and call[1][0] not in "^~0123456789":
                self._stack = (*self._stack[:-1], replace(self._stack[-1], code=call[1]))
                return "code"
        if isinstance(mark.event, NoEvent):
            self._words(mark, form)
            return "words"
        if isinstance(mark.event, OF_MACHINE):
            self.machine.append(mark)
            return "words"
        if self.state == "ignored":
            self._stack = ()
        else:
            self._keep(mark)
        return "event"

    def _words(self, mark: LogEvent, form: Form) -> None:
        """Read a line without an event: more of torch's message, a complaint, or progress."""
        last = self.marks[-1] if self.marks else mark
        if self.state == "message" and self._message and mark.line - last.line <= _WRAPPED:
            # A terminal breaks a line inside of a word, or at a space.
            more = mark.text.strip()
            self._message = [text + gap + more for text in self._message for gap in (" ", "")]
            memory = max(map(torch_memory, self._message), key=lambda read: read.figures)
            if isinstance(last.event, TorchMemory) and memory.figures > last.event.figures:
                self.marks[-1] = last._replace(event=memory)
        self.told_still |= form.ask(_tells_of_a_hang)
        complains = form.ask(_COMPLAINT) and _COMPLAINT(_NONE_OF_THEM.sub("", mark.text))
        if complains or form.ask(tells_of_memory):
            self.complaint = mark
        elif '"POST /' in mark.text:
            self.complaint = self.complaint or (mark if _REFUSED(mark.text) else None)
        elif form.ask(_PROGRESS):
            self._progress.append(mark.line)

    def _keep(self, mark: LogEvent) -> None:
        """Store an event, which ends the traceback or the message before it."""
        if not mark.text.startswith(" "):
            self._stack = ()
        self._message = [mark.text] if isinstance(mark.event, TorchMemory) else []
        if not isinstance(mark.event, events.ServerFigures):
            self.waiting = None
        if isinstance(mark.event, _RAISES):
            mark = mark._replace(after=self._handled, copied=self._copied)
            self._handled, self._copied = 0, False
        else:
            mark = mark._replace(stack=())
        self.marks.append(mark)

    def _counts_until(self, mark: LogEvent, line: int) -> bool:
        """Return whether an event may be the cause of the exception at ``line``.

        An event is no cause if its words report no end and no traceback is before it, or if two
        lines after it show progress.
        """
        in_words = isinstance(mark.event, KnownMessage)
        ended = mark.kind in _MACHINE or mark.stack or END.search(mark.text)
        if in_words and not ended:
            return False
        place = bisect_left(self._progress, line) - 2
        survived = place >= 0 and mark.line < self._progress[place]
        deadly = any(word in mark.text for word in _NEVER_OUTLIVED)
        return deadly or not survived or not (in_words or isinstance(mark.event, PythonError))


def _tells_of_a_hang(text: str) -> bool:
    """Return whether a line is a person's words on a program that stands still."""
    return _HANGS(text) is not None and _PERHAPS(text) is None and OF_PROGRAM(text) is None


def tells_of_memory(text: str) -> bool:
    """Return whether a line tells in words alone that the GPU memory ran out."""
    return _IN_WORDS(text) is not None and _PERHAPS(text) is None


def read_runs(lines: Iterable[LogLine]) -> list[LogFacts]:
    """Return the facts of each run of an engine in a whole log, in order.

    Of a log with many runs only the first and the last runs are kept.
    """
    runs = [LogFacts(Subject(), [])]
    for number, text in lines:
        form = form_of(text)
        if runs[-1].begins_next_run(text, form):
            runs.append(LogFacts(runs[-1].subject, runs[-1].machine))
            del runs[_RUNS:-_RUNS]
        runs[-1].take(number, text, form)
    return runs
