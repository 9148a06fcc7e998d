"""What lines that nobody knows tell by their form: an error, a refusal, or progress."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from turbofit.diagnose.event import LogEvent
from turbofit.observe.log_events import KnownMessage
from turbofit.observe.log_reader import by_form

if TYPE_CHECKING:
    from turbofit.observe.log_events import PythonFrame

#: A line of no level below an error, and of no client that left before its answer, which LMDeploy
#: 0.7 to 0.12 logs as an error, nor a remark of Triton's compiler that LMDeploy calls harmless.
_NO_LESS = (
    r"(?!.{0,60}?(\b(INFO|DEBUG|WARN(ING)?|NOTICE|info|debug|warn(ing)?|notice)\b|Warning:))"
    r"(?!.*\[(safe_run|model_inst)\] exception caught:( GeneratorExit| CancelledError)? *$)"
    r"(?!.*operation scheduled before its operands|.*following error\W*$)"
)
#: A line that no row knows and that tells of an error, whoever wrote it.
_COMPLAINT: Final = re.compile(
    rf"{_NO_LESS}(?!.*:\s*$).*?(?:\b(?:[Ee]rror|ERROR|FATAL|[Ff]atal|CRITICAL|[Ff]ailed"
    r"|Aborted|Killed|denied|refused|Segmentation)\b|NCCL WARN|requires .{1,120}, but you have"
    r"|(?<=\.)\w*(?:Timeout|Expired|Disconnected): |NVRM:.{0,240}?(?:failed|error|Xid|mismatch))"
)
#: A line that may tell of one: words in which a program refuses, an exception of any name.
_REFUSAL: Final = re.compile(
    rf"{_NO_LESS}(?:.*?(?i:error|failed|exce(?:ption|ed)|can(?:no|')t |could not|unable to|invalid"
    r"|unsupported|n't support|不支持|not (support|found)|has no |(should|must) (not )?be )"
    r"|(\w+\.)+[A-Z]\w*(: |$))"
)
#: What a program writes of its errors, and nobody else: a level, a time, the name of an exception.
_LOGGED: Final = re.compile(
    r".*?(?:\b(?:ERROR|FATAL|CRITICAL)\b|\w(?:Error|Exception)\b|\berror: |NCCL|NVRM|\[TM\])"
    r"|\W{0,4}(?:\d{2,4}[-:/]\d|[A-Z]\w+ [Ee]rror|Failed|Fatal|Segmentation)"
)
#: A word of failures with its value, which is none: a count, and no failure.
_NONE_OF_THEM: Final = re.compile(
    r"(?i:\b(?:\w+ )?(?:failed|failures?|errors?|refused|rejected)(?: requests?)?"
    r"\W{1,12}0(?:\.0+)?\b"
    r"|\b(?:0|no) (?:\w+ )?(?:failed|failures?|errors?|refused))(?![\w.])"
)
#: What a program says while it goes on: a level, a bar that grows; not while it ends. A server
#: answers probes and counts tokens, and NCCL's threads speak, also after their engine has died.
_PROGRESS: Final = re.compile(
    r"(?!.*(?:[Ss]hut|[Ee]xit|[Tt]erminat|[Kk]ill|[Cc]lean|[Ss]top|[Rr]etry|HTTP/\d|NCCL INFO"
    r"|throughput))(?:.{0,60}?\bINFO\b|.{0,200}?\d%\|)"
)
#: A request that a server did not answer as was asked. Those without a key, or for what no server
#: has, are left out: anybody may send them.
_UNANSWERED: Final = re.compile(
    r'INFO: .{0,60}?"POST /\S{0,240} HTTP/[\d.]+" (?:4(?!0[1345])\d\d|5\d\d)\b'
)
#: A request that a server answered.
_ANSWERED: Final = re.compile(r'INFO: .{0,60}?"POST /\S{0,240} HTTP/[\d.]+" 200\b')


#: A numbered source line of a traceback, as IPython and rich show them, and the call that raises.
_SOURCE: Final = re.compile(
    r" *(?:-+> ?\d|\d{1,5} {2,}\S|\d{1,5} (?:(?:except|raise|def|if|return|try|with|for)\b"
    r"|[\w.]+\())"
    r"|\s*raise [\w.]+\("
)


class Mood:
    """The lines of one run that nobody knows."""

    def __init__(self) -> None:
        #: The last line that tells of an error and is no event, and the last that may.
        self.last_complaint: LogEvent | None = None
        self.last_refusal: LogEvent | None = None
        #: Whether a page shows pictures, whose text nobody can read here.
        self.pictures = False
        #: The first line that says that a server answered.
        self.answered: LogEvent | None = None

    def notice(self, line: int, text: str) -> None:
        """Take in any row: whether a server answered, or refused."""
        self.pictures = self.pictures or "![" in text or "<img " in text
        if _UNANSWERED.match(text):
            self.complain(LogEvent(line, text, KnownMessage()))
        elif self.answered is None and _ANSWERED.match(text):
            self.answered = LogEvent(line, text, KnownMessage())

    @property
    def logged(self) -> LogEvent | None:
        """The last complaint, where a program wrote it, and no person."""
        mark = self.last_complaint
        return mark if mark and _LOGGED.match(mark.text) else None

    def told_at(self, line: int) -> bool:
        """Whether a program wrote the last complaint in this line."""
        return self.logged is not None and self.logged.line == line

    def complain(self, mark: LogEvent) -> None:
        """Take an error that ends nothing for the last one, where there is no other."""
        self.last_complaint = self.last_complaint or mark

    def refuse(self, mark: LogEvent) -> None:
        self.last_refusal = mark

    def goes_on(self, line: int, text: str, stack: tuple[PythonFrame, ...]) -> bool:
        """Take in a row that no event has: whether it shows that the program goes on."""
        complains, refuses, progresses = _sound_of(text)
        if _SOURCE.match(text):
            return False
        # A count of none is no failure.
        told = _NONE_OF_THEM.sub("", text) if complains or refuses else ""
        if complains and _COMPLAINT.match(told):
            self.last_complaint = LogEvent(line, text, KnownMessage(), stack)
        elif refuses and _REFUSAL.match(told):
            self.last_refusal = LogEvent(line, text, KnownMessage(), stack)
        else:
            return progresses
        return False


def tells_of_error(text: str) -> bool:
    """Whether words tell of an error, or may."""
    return any(_sound_of(text)[:2])


@by_form
def _sound_of(form: str) -> tuple[bool, bool, bool]:
    """Whether a line sounds like an error, like a refusal, and like a program that goes on."""
    goes_on = ("INFO" in form or "%|" in form) and _PROGRESS.match(form)
    return bool(_COMPLAINT.match(form)), bool(_REFUSAL.match(form)), bool(goes_on)
