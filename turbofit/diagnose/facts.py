"""Everything that was recognised in a log, with the lines it stands on."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from turbofit.diagnose.rules.causes import told_figures
from turbofit.diagnose.subject import FactCollector
from turbofit.launch.engine.log_file import repeats
from turbofit.machine.nvidia_smi import SmiTable
from turbofit.observe.log_events import (
    OF_LAUNCH,
    OF_MACHINE,
    PAST_LOADING,
    Backpressure,
    KnownMessage,
    LegacyCuda,
    PythonError,
    PythonFrame,
    Starting,
    TorchMemory,
    WarmupLengths,
)
from turbofit.observe.log_reader import read_line, torch_memory

if TYPE_CHECKING:
    from collections.abc import Iterable

    from turbofit.core.struct import Struct
    from turbofit.diagnose.rows import Row

_TIME: Final = re.compile(r"\[TM\]\[[A-Z]+\]\[(\d{4}\.[\d:.]+)\]")
#: The source line of a frame, indented or, in a notebook, behind an arrow.
_CALL: Final = re.compile(r"(?:    |-+> \d+)\s*(.+)")
#: The same where a page has lost what stood before it; a program's next line has a date or a level.
_UNINDENTED: Final = re.compile(r"(?![\[\d]|.{0,60}?\b(?:ERROR|FATAL|CRITICAL)\b)(\S.+)")
_T = TypeVar("_T", bound="Struct")
#: An engine's beginning: its command, its bars, and what it says before its weights.
_BEGUN: Final = re.compile(
    r"\blmdeploy (?:serve|chat)\b|\bapi_server\b|\bturbofit \w+ |\bpipeline\(|\bLoading\b"
    r"|max_context_token_num"
)
#: A command that somebody ran, with or without the prompt of a shell.
_COMMAND: Final = re.compile(
    r"[$#>] \w|(?:lmdeploy|vllm|sglang|docker|podman|python[\d.]*|torchrun|accelerate) +[\w./-]+ "
)
#: What an engine says again when it is started again, and nothing else does.
_BEGINS: Final = re.compile(
    r"\blmdeploy (?:serve|chat) |\bturbofit serve |\bLoading[\w ]*: +0%|max_context_token_num"
)
#: A line of no level below an error.
_NO_LESS = r"(?!.{0,60}?(\b(INFO|DEBUG|WARN(ING)?|NOTICE|info|debug|warn(ing)?|notice)\b|Warning:))"
#: A line that no row knows and that tells of an error, whoever wrote it.
_COMPLAINT: Final = re.compile(
    rf"{_NO_LESS}(?!.*Last error:\s*$).*?(?:\b(?:[Ee]rror|ERROR|FATAL|[Ff]atal|CRITICAL|[Ff]ailed"
    r"|Aborted|Killed|denied|refused|Segmentation)\b|NCCL WARN"
    r"|(?<=\.)\w*(?:Timeout|Expired|Disconnected): |NVRM:.{0,240}?(?:failed|error|Xid|mismatch))"
)
#: A line that may tell of one: words in which a program refuses, an exception of any name.
_REFUSAL: Final = re.compile(
    rf"{_NO_LESS}(?:.*?(?i:error|failed|exce(?:ption|ed)|can(?:no|')t |could not|unable to|invalid"
    r"|unsupported|not (supported|found)|has no |(should|must) (not )?be )|(\w+\.)+[A-Z]\w*(: |$))"
)
#: What a program says while it goes on: a level, a bar that grows; not while it ends. A server
#: answers probes and counts tokens, and NCCL's threads speak, also after their engine has died.
_PROGRESS: Final = re.compile(
    r"(?!.*(?:[Ss]hut|[Ee]xit|[Tt]erminat|[Kk]ill|[Cc]lean|[Ss]top|[Rr]etry|HTTP/\d|NCCL INFO"
    r"|throughput))(?:.{0,60}?\bINFO\b|.{0,200}?\d%\|)"
)
#: What tells of no error: a level below one, a bar; and words that any failure has.
_CALM: Final = re.compile(
    r".{0,60}?\b(?:INFO|DEBUG|(?P<warns>WARN(?:ING)?))\b|.{0,200}?\d%\|"
    r"|.{0,240}?\.py:\d+: (?P<python>\w*Warning): "
)
_ALARM: Final = re.compile(
    r"error|fail|exce(?:ption|ed)|abort|refus|denied|time(?:d |-)?out|unable|can(?:no|')t"
    r"|invalid|crash|kill|fatal|dump|lost|oom|out of|exit|shut|stop|traceback|mismatch|missing",
    re.IGNORECASE,
)
#: A warning of Python with nothing behind its name, or with a colon at its end.
_WARNS_BELOW: Final = re.compile(r".{0,240}?\.py:\d+: \w*Warning: ?(?:.*:)?$")
#: A word of failures, and of the lines that Python's own warnings go on with.
_DENIAL: Final = re.compile(r"\bnot?\b", re.IGNORECASE)
#: Rows of the longest log that is said to have no error.
_WEIGHED: Final = 2000
#: A request that a server did not answer as was asked. Those without a key, or for what no server
#: has, are left out: anybody may send them.
_UNANSWERED: Final = re.compile(
    r'INFO: .{0,60}?"POST /\S{0,240} HTTP/[\d.]+" (?:4(?!0[1345])\d\d|5\d\d)\b'
)
#: A request that a server answered.
_ANSWERED: Final = re.compile(r'INFO: .{0,60}?"POST /\S{0,240} HTTP/[\d.]+" 200\b')
#: What LMDeploy's server counts of its requests, a line each ten seconds: it names failures, too.
#: Source: lmdeploy metrics/loggers.py `Server (succeeded/failed/routed/waiting): `
_COUNTED: Final = re.compile(
    r".{0,120}?\bServer \(succeeded/failed/routed/waiting\): (\d+) / (\d+) / "
)
#: An exception in a destructor while the program ends: Python goes on. Of a stream that could not
#: be written it may be all that is said.
_IN_DESTRUCTOR: Final = re.compile(
    r"Exception ignored (?:in|on)\b.{0,240}?(?:__del__|atexit|callback|finalize)"
)
_TRACEBACK: Final = "Traceback (most recent call last)"
#: A rule that a notebook draws, and what stands between two exceptions of one chain.
_RULE: Final = "-" * 20
_PASSES_ON: Final = "The above exception was the direct cause"
_CHAIN: Final = ("During handling of the above exception", _PASSES_ON)
_LONGEST_STACK: Final = 60
#: Runs at each end of a log whose facts are kept.
_RUNS: Final = 16
#: What a terminal may break into several lines.
_MESSAGES: Final = (KnownMessage, PythonError, TorchMemory)
#: A terminal breaks a message into at most so many more lines.
_WRAPPED: Final = 6
#: More events of one kind than this add nothing: a living engine prints some for each request.
_ENOUGH: Final = 50_000


class LogEvent(NamedTuple):
    """An event and the line that told it.

    ``stack`` are frames of Python before it, innermost last; ``time`` is TurboMind's, or empty.
    """

    line: int
    text: str
    event: Struct
    stack: tuple[PythonFrame, ...] = ()
    time: str = ""


class LogFacts:
    """What a log tells of one run. ``waits`` counts the scheduler's "out of memory at" since news.

    ``lines`` and ``subject`` are the whole log's.
    """

    def __init__(self) -> None:
        self.lines = 0
        self.marks: list[LogEvent] = []
        self.subject = FactCollector()
        #: The line of an engine's beginning.
        self.begun_at: int | None = None
        #: Whether the command that was run stands in the log.
        self.commanded = False
        #: The last line that tells of an error and is no event.
        self.last_complaint: LogEvent | None = None
        #: The last line that may tell of an error.
        self.last_refusal: LogEvent | None = None
        #: The first line that says that a server answered.
        self.answered: LogEvent | None = None
        #: The last count of requests that did not end as they were asked.
        self.failed_requests = 0
        #: The last two lines of progress.
        self._progress = (0, 0)
        #: Two lines of progress stand between here and the last exception that no row knows.
        self.outlived_before = 0
        #: The last line at which the exception of a destructor is waited for.
        self._ignored_until = 0
        self.waits = 0
        self.waiting: LogEvent | None = None
        self._stack: list[PythonFrame] = []
        #: Whether the row before is a frame, whose source line comes next.
        self._at_frame = False
        self._table = SmiTable()
        #: The place in `marks` of a message that may go on, and the ways to join its lines.
        self._message: tuple[int, list[str]] | None = None
        self._counts: dict[type, int] = {}
        self._followed = False
        #: A warning of Python whose message begins in the next row.
        self._warning = ""
        #: Rows that belong to no traceback, and events that are none of its source lines: a chain
        #: of exceptions counts once.
        self.rows_beside = 0
        self.errors = 0
        #: The last line that says that the next exception passes on the one before.
        self.passed_on = 0
        self._rows = self._calm = 0
        self._alarmed = self._warned = False

    @property
    def calm(self) -> bool:
        """Whether most lines are of a level or bars, and none but warnings has a failure's word."""
        return not self._alarmed and 2 * self._calm > self._rows

    def take(self, line: int, text: str) -> None:
        self.lines = max(self.lines, line)
        self.subject.notice(text)
        self._note(line, text)
        if not self._is_count(line, text):
            self._weigh(text)
            self._take(line, text)

    def _take(self, line: int, text: str) -> None:
        repeated = repeats(text)
        if repeated is not None:
            self.waits += repeated if self.waits else 0
            return
        text, event = self._read(text)
        if isinstance(event, Backpressure):
            if event.cause == "memory":
                self.waits += 1
                self.waiting = self.waiting or LogEvent(line, text, event)
            return
        if self._message and not self._continues(line, text, event):
            self._message = None
        follows, self._at_frame = self._at_frame, isinstance(event, PythonFrame)
        if isinstance(event, PythonFrame):
            self._stack.append(event)
            if self._followed:
                mark = self.marks[-1]
                self.marks[-1] = mark._replace(stack=(*mark.stack, event))
            return
        call = _CALL.match(text) if self._stack else None
        if follows and event is None and not call:
            call = _UNINDENTED.match(text)
        if text.startswith(_CHAIN):
            self.rows_beside -= 1
            self.errors -= 1
        elif not (call or _TRACEBACK in text or text.startswith(_RULE)):
            self.rows_beside += 1
        if _IN_DESTRUCTOR.match(text):
            self._ignored_until = line + _LONGEST_STACK
        if line <= self._ignored_until and isinstance(event, KnownMessage | PythonError):
            if self.last_complaint is None:
                self.last_complaint = LogEvent(line, text, KnownMessage(), tuple(self._stack))
            self._ignored_until, self._stack = 0, []
        elif event is not None:
            self._keep(line, text, event)
        elif call:
            self._code(line, call[1])
        elif _COMPLAINT.match(text):
            self.last_complaint = LogEvent(line, text, KnownMessage(), tuple(self._stack))
        elif _REFUSAL.match(text):
            self.last_refusal = LogEvent(line, text, KnownMessage(), tuple(self._stack))
        elif ("INFO" in text or "%|" in text) and _PROGRESS.match(text):
            self._progress = (self._progress[1], line)
        if _TRACEBACK in text:
            self._stack.clear()
            last = self.marks[-1] if self.marks else None
            # vLLM and many frameworks print the message first, and its traceback after it.
            self._followed = (
                last is not None and isinstance(last.event, TorchMemory) and not last.stack
            )
        self.subject.read(line, text)

    def _note(self, line: int, text: str) -> None:
        if self.begun_at is None and _BEGUN.search(text):
            self.begun_at = line
        if text.startswith(_PASSES_ON):
            self.passed_on = line
        self.commanded = self.commanded or _COMMAND.match(text) is not None
        if _UNANSWERED.match(text):
            self.last_complaint = LogEvent(line, text, KnownMessage())
        if self.answered is None and _ANSWERED.match(text):
            self.answered = LogEvent(line, text, KnownMessage())

    def _is_count(self, line: int, text: str) -> bool:
        """Whether a row is LMDeploy's count of requests, which is taken here."""
        counted = _COUNTED.match(text)
        if counted is None:
            return False
        self.failed_requests = int(counted[2])
        if self.answered is None and int(counted[1]):
            self.answered = LogEvent(line, text, KnownMessage())
        return True

    def _weigh(self, text: str) -> None:
        self._rows += 1
        self._alarmed = self._alarmed or self._rows > _WEIGHED
        if self._alarmed:
            return
        calm = _CALM.match(text)
        if calm:
            self._calm += 1
            self._warned = calm["python"] is not None
            if self._warned or calm["warns"]:
                return
        denied = not self._warned and _DENIAL.search(text)
        self._alarmed = bool(_ALARM.search(text) or denied)

    def ended_by(self, text: str) -> bool:
        """Whether a row begins another run: an engine that was past its beginning begins again."""
        begins = _BEGINS.search(text) is not None
        return begins and any(isinstance(mark.event, PAST_LOADING) for mark in self.marks)

    def first(self, kind: type[_T]) -> LogEvent | None:
        return next((mark for mark in self.marks if isinstance(mark.event, kind)), None)

    def first_event(self, kind: type[_T]) -> _T | None:
        return next((event for _, event in self.every(kind)), None)

    def every(self, kind: type[_T]) -> list[tuple[LogEvent, _T]]:
        return [(mark, mark.event) for mark in self.marks if isinstance(mark.event, kind)]

    def before(self, mark: LogEvent, kind: type[_T]) -> bool:
        """Whether an event of a kind came before a mark.

        TurboMind's fatal lines overtake what its logger has queued: its own times count too.
        """
        return any(
            isinstance(other.event, kind)
            and (other.line < mark.line or (other.time and mark.time and other.time <= mark.time))
            for other in self.marks
        )

    @property
    def session_limit(self) -> int | None:
        """Tokens of the longest request that the engine accepts, where the log says it."""
        return next((event.session for _, event in self.every(Starting) if event.session), None)

    @property
    def longest_warmup(self) -> int:
        """Tokens of the longest announced warm-up request that the engine accepts; 0: none is."""
        warmup, limit = self.first_event(WarmupLengths), self.session_limit
        lengths = warmup.lengths if warmup else ()
        return max((length for length in lengths if limit is None or length <= limit), default=0)

    def _read(self, text: str) -> tuple[str, Struct | None]:
        """A row with its event, behind the warning of Python whose message begins in it."""
        event = self._event(text)
        if isinstance(event, KnownMessage) and self._warning:
            text = f"{self._warning} {text}"
        self._warning = text if _WARNS_BELOW.match(text) else ""
        return text, event

    def _event(self, text: str) -> Struct | None:
        event = read_line(text)
        if isinstance(event, OF_LAUNCH):
            event = None
        if event is None or isinstance(event, PythonError):
            return self._table.line(text) or (KnownMessage() if told_figures(text) >= 0 else event)
        return event

    def _continues(self, line: int, text: str, event: Struct | None) -> bool:
        """Join a message that a terminal broke: whether this line may be a part of it.

        Nobody knows whether a break stood in a word or in place of a space: both are tried.
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
                self.marks[index] = mark._replace(event=memory)
        else:
            best = max(joined, key=told_figures)
            if told_figures(best) > told_figures(mark.text):
                self.marks[index] = mark._replace(event=KnownMessage(), text=best)
        return True

    def _code(self, line: int, text: str) -> None:
        last = self._stack[-1]
        if not last.code and not text.startswith(("^", "~")):
            self._stack[-1] = PythonFrame(path=last.path, function=last.function, code=text)
            self.last_refusal = LogEvent(line, text, KnownMessage(), tuple(self._stack))

    def _keep(self, line: int, text: str, event: Struct) -> None:
        self._followed = False
        self.errors += not text.startswith(" ")
        kind = type(event)
        self._counts[kind] = self._counts.get(kind, 0) + 1
        if self._counts[kind] > _ENOUGH:
            return
        stack: tuple[PythonFrame, ...] = ()
        if isinstance(event, TorchMemory | PythonError | LegacyCuda | KnownMessage):
            stack = tuple(self._stack)
        if isinstance(event, _MESSAGES):
            self._message = (len(self.marks), [text])
        if self._stack and not text.startswith(" "):
            self._stack = []
        if isinstance(event, PythonError):
            self.outlived_before = self._progress[0]
        self.waits, self.waiting = 0, None
        time = _TIME.match(text)
        self.marks.append(LogEvent(line, text, event, stack, time[1] if time else ""))


def read_runs(rows: Iterable[Row]) -> list[LogFacts]:
    """Read a whole log: the facts of each run of an engine that it has, in order.

    Of an engine that is started again for ever the first and the last runs.
    """
    runs = [LogFacts()]
    for line, text, program in rows:
        if runs[-1].ended_by(text):
            again = LogFacts()
            again.subject = runs[-1].subject
            runs.append(again)
        runs[-1].take(line, text)
        if program:
            runs[-1].subject.programs.add(program)
            runs[-1].subject.of_inference = True
    machine = [mark for run in runs for mark in run.marks if isinstance(mark.event, OF_MACHINE)]
    kept = runs if len(runs) <= 2 * _RUNS else [*runs[:_RUNS], *runs[-_RUNS:]]
    for run in kept if len(runs) > 1 else ():
        others = [mark for mark in run.marks if not isinstance(mark.event, OF_MACHINE)]
        run.marks = sorted((*others, *machine), key=lambda mark: mark.line)
        run.lines = runs[-1].lines
    return kept
