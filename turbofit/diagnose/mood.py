"""Judges unknown lines by their form: an error, a refusal, or progress."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from turbofit.diagnose.event import LogEvent
from turbofit.observe.log_events import KnownMessage
from turbofit.observe.log_reader import by_form

if TYPE_CHECKING:
    from turbofit.observe.log_events import PythonFrame

#: Excludes lines of a level below error; of a client that left before its answer, which LMDeploy
#: 0.7 to 0.12 logs as an error; and a remark of Triton's compiler that LMDeploy calls harmless.
_NO_LESS = (
    r"(?!.{0,60}?(\b(INFO|DEBUG|WARN(ING)?|NOTICE|info|debug|warn(ing)?|notice)\b|Warning:))"
    r"(?!.*\[(safe_run|model_inst)\] exception caught:( GeneratorExit| CancelledError)? *$)"
    r"(?!.*operation scheduled before its operands|.*following error\W*$)"
)
#: A line that no row matches and that reports an error, by any author.
_COMPLAINT: Final = re.compile(
    rf"{_NO_LESS}(?!.*:\s*$).*?(?:\b(?:[Ee]rror|ERROR|FATAL|[Ff]atal|CRITICAL|[Ff]ailed"
    r"|Aborted|Killed|denied|refused|Segmentation)\b|NCCL WARN|requires .{1,120}, but you have"
    r"|(?<=\.)\w*(?:Timeout|Expired|Disconnected): |NVRM:.{0,240}?(?:failed|error|Xid|mismatch))"
)
#: A line that may report an error: a refusal, or an exception with any name.
_REFUSAL: Final = re.compile(
    rf"{_NO_LESS}(?:.*?(?i:error|failed|exce(?:ption|ed)|can(?:no|')t |could not|unable to|invalid"
    r"|unsupported|n't support|不支持|not (support|found)|has no |(should|must) (not )?be )"
    r"|(\w+\.)+[A-Z]\w*(: |$))"
)
#: Marks of errors that only programs write: a level, a time, the name of an exception.
_LOGGED: Final = re.compile(
    r".*?(?:\b(?:ERROR|FATAL|CRITICAL)\b|\w(?:Error|Exception)\b|\berror: |NCCL|NVRM|\[TM\])"
    r"|\W{0,4}(?:\d{2,4}[-:/]\d|[A-Z]\w+ [Ee]rror|Failed|Fatal|Segmentation)"
)
#: A word for failures with the value 0 or none: a count, not a failure.
_NONE_OF_THEM: Final = re.compile(
    r"(?i:\b(?:\w+ )?(?:failed|failures?|errors?|refused|rejected)(?: requests?)?"
    r"\W{1,12}0(?:\.0+)?\b"
    r"|\b(?:0|no) (?:\w+ )?(?:failed|failures?|errors?|refused))(?![\w.])"
)
#: Lines of a program that continues: a level, a growing bar; not while it ends. A server answers
#: probes and counts tokens, and NCCL's threads print, even after their engine has died.
_PROGRESS: Final = re.compile(
    r"(?!.*(?:[Ss]hut|[Ee]xit|[Tt]erminat|[Kk]ill|[Cc]lean|[Ss]top|[Rr]etry|HTTP/\d|NCCL INFO"
    r"|throughput))(?:.{0,60}?\bINFO\b|.{0,200}?\d%\|)"
)
#: A request that a server refused or failed. Requests without a key, or for paths that no server
#: has, do not count: anybody may send them.
_UNANSWERED: Final = re.compile(
    r'.{0,120}?"POST /\S{0,240} HTTP/[\d.]+" (?:4(?!0[1345])\d\d|5\d\d)\b'
)
#: A request that a server answered.
_ANSWERED: Final = re.compile(r'INFO: .{0,60}?"POST /\S{0,240} HTTP/[\d.]+" 200\b')


#: A numbered source line of a traceback, as IPython and rich show it, and the call that raises.
_SOURCE: Final = re.compile(
    r" *(?:-+> ?\d|\d{1,5} {2,}\S|\d{1,5} (?:(?:except|raise|def|if|return|try|with|for)\b"
    r"|[\w.]+\())"
    r"|\s*raise [\w.]+\("
)


class Mood:
    """The unknown lines of one run."""

    def __init__(self) -> None:
        #: The last line without an event that reports an error, and the last one that may report
        #: one.
        self.last_complaint: LogEvent | None = None
        self.last_refusal: LogEvent | None = None
        #: Whether a page shows pictures, whose text cannot be read here.
        self.pictures = False
        #: The first line which says that a server answered.
        self.answered: LogEvent | None = None

    def notice(self, line: int, text: str) -> None:
        """Read any row for a server's answer or refusal, and for pictures."""
        self.pictures = self.pictures or "![" in text or "<img " in text
        if '"POST /' not in text:
            return
        if _UNANSWERED.match(text):
            self.complain(LogEvent(line, text, KnownMessage()))
        elif self.answered is None and _ANSWERED.match(text):
            self.answered = LogEvent(line, text, KnownMessage())

    @property
    def logged(self) -> LogEvent | None:
        """The last complaint if a program wrote it, not a person; else None."""
        mark = self.last_complaint
        return mark if mark and _LOGGED.match(mark.text) else None

    def told_at(self, line: int) -> bool:
        """Whether this line is the last complaint, and a program wrote it."""
        return self.logged is not None and self.logged.line == line

    def complain(self, mark: LogEvent) -> None:
        """Keep an error that ended nothing as the last complaint, if there is no other."""
        self.last_complaint = self.last_complaint or mark

    def refuse(self, mark: LogEvent) -> None:
        self.last_refusal = mark

    def goes_on(self, line: int, text: str, stack: tuple[PythonFrame, ...]) -> bool:
        """Read a row without an event; returns whether it shows that the program continues."""
        complains, refuses, progresses = _sound_of(text)
        if _SOURCE.match(text):
            return False
        # A count of 0 is no failure.
        told = _NONE_OF_THEM.sub("", text) if complains or refuses else ""
        if complains and _COMPLAINT.match(told):
            self.last_complaint = LogEvent(line, text, KnownMessage(), stack)
        elif refuses and _REFUSAL.match(told):
            self.last_refusal = LogEvent(line, text, KnownMessage(), stack)
        else:
            return progresses
        return False


def tells_of_error(text: str) -> bool:
    """Whether words report an error, or may report one."""
    return any(_sound_of(text)[:2])


@by_form
def _sound_of(form: str) -> tuple[bool, bool, bool]:
    """Whether a line sounds like an error, like a refusal, or like a program that continues."""
    goes_on = ("INFO" in form or "%|" in form) and _PROGRESS.match(form)
    return bool(_COMPLAINT.match(form)), bool(_REFUSAL.match(form)), bool(goes_on)
