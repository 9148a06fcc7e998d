"""Judges unknown lines by their form: an error, a refusal, or progress."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Literal

from turbofit.diagnose.event import LogEvent

if TYPE_CHECKING:
    from turbofit.observe.log_reader import Form

Sound = Literal["error", "refusal", "progress", ""]
_TROUBLE: Final = ("error", "refusal")

#: Lines of a level below error, or with an option that names a level; of a client that left before
#: its answer, which LMDeploy 0.7 to 0.12 logs as an error; and a remark of Triton's compiler that
#: LMDeploy calls harmless.
_LESS: Final = re.compile(
    r".{0,60}?(?:\b(?:INFO|DEBUG|WARN(?:ING)?|NOTICE|info|debug|warn(?:ing)?|notice)\b|Warning:)"
    r"|.*\[(?:safe_run|model_inst)\] exception caught:(?: GeneratorExit| CancelledError)? *$"
    r"|.*operation scheduled before its operands|.*following error\W*$"
    r"|.*\blog[-_]level['\"]?[ =:]+['\"]?[A-Z]+\b"
)
#: Words of a line that no row matches and that reports an error, by any author.
_COMPLAINT: Final = re.compile(
    r"\b(?:[Ee]rror|ERROR|FATAL|[Ff]atal|CRITICAL|[Ff]ailed|Aborted|Killed|denied|refused"
    r"|Segmentation)\b|NCCL WARN|requires .{1,120}, but you have"
    r"|(?<=\.)\w*(?:Timeout|Expired|Disconnected): |NVRM:.{0,240}?(?:failed|error|Xid|mismatch)"
)
#: Words that may report an error: a refusal, or an exception with any name.
_REFUSAL: Final = re.compile(
    r"(?i:error|failed|exce(?:ption|ed)|can(?:no|')t |could not|unable to|invalid|unsupported"
    r"|n't support|不支持|not (?:support|found)|has no |(?:should|must) (?:not )?be )"
    r"|^(?:\w+\.)+[A-Z]\w*(?:: |$)"
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
#: Lines of a program that continues: a level, a growing bar.
_PROGRESS: Final = re.compile(r".{0,60}?\bINFO\b|.{0,200}?\d%\|")
#: Not while it ends, or tries again. A server answers probes and counts tokens, and NCCL's threads
#: print, even after their engine has died.
_NO_PROGRESS: Final = (
    "shut", "exit", "terminat", "kill", "clean", "stop", "retry", "http/", "nccl info", "throughput"
)  # fmt: skip
#: A request to a server, and the status of its answer.
_POST: Final = re.compile(r'"POST /\S{0,240} HTTP/[\d.]+" (\d{3})\b')
#: Requests without a key, or for paths that no server has: anybody may send them.
_ANYBODYS: Final = ("401", "403", "404", "405")
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
        at = text.find('"POST /')
        answer = _POST.match(text, at) if at >= 0 else None
        if answer is None or answer[1] in _ANYBODYS:
            return
        if answer[1].startswith(("4", "5")):
            self.complain(LogEvent(line, text))
        elif self.answered is None and answer[1] == "200" and "INFO: " in text[:at]:
            self.answered = LogEvent(line, text)

    @property
    def logged(self) -> LogEvent | None:
        """The last complaint if a program wrote it, not a person; else None."""
        mark = self.last_complaint
        return mark if mark and _LOGGED.match(mark.text) else None

    def complain(self, mark: LogEvent) -> None:
        """Keep an error that ended nothing as the last complaint, if there is no other."""
        self.last_complaint = self.last_complaint or mark

    def refuse(self, mark: LogEvent | None) -> None:
        self.last_refusal = mark or self.last_refusal

    def goes_on(self, mark: LogEvent, form: Form) -> bool:
        """Read a row without an event; returns whether it shows that the program continues."""
        sound = "" if mark.text.startswith("#") else form.ask(sound_of)
        if sound in _TROUBLE:  # A count of 0 is no failure.
            sound = sound_of(without_zero_counts(mark.text))
        if sound == "error":
            self.last_complaint = mark
        elif sound == "refusal":
            self.last_refusal = mark
        return sound == "progress"


def without_zero_counts(text: str) -> str:
    """The text without its counts of no failures."""
    return _NONE_OF_THEM.sub("", text)


def tells_of_error(text: str) -> bool:
    """Whether words report an error, or may report one."""
    return sound_of(text) in _TROUBLE


def sound_of(text: str) -> Sound:
    """What a line reports, by its form: an error, perhaps an error, or that its program goes on."""
    if _SOURCE.match(text):
        return ""
    if not _LESS.match(text):
        if _COMPLAINT.search(text) and not text.rstrip().endswith(":"):
            return "error"
        if _REFUSAL.search(text):
            return "refusal"
    goes_on = _PROGRESS.match(text) and not any(map(text.lower().__contains__, _NO_PROGRESS))
    return "progress" if goes_on else ""
