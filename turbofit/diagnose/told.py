"""Reads people's words around a log: a report's title, and sentences around pasted text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from turbofit.diagnose.event import LogEvent
from turbofit.diagnose.mood import tells_of_error, without_zero_counts
from turbofit.diagnose.rows import by_program
from turbofit.diagnose.rules.causes import hits_of
from turbofit.observe.log_events import KnownMessage

if TYPE_CHECKING:
    from turbofit.diagnose.rules.causes import Row

#: A program's message in a sentence: an exception with its name, or the text after "error:".
_NAMED: Final = re.compile(
    r"((?a:(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Warning)): .+)"
    r"|(?:报错|错误|信息|\b[Ee]rror|[Mm]essage)(?:为|是)?\s?[:：]\s*([^\s\"'`].{12,})"
)
#: Messages that people quote without the name of their exception.
_NAMELESS: Final = (
    ("AttributeError", re.compile(r"'[\w.]+' object has no attribute '\w+'.*")),
    (
        "TypeError",
        re.compile(
            r"\S+ got an unexpected keyword argument '\w+'.*|missing \d+ required positional arg.*"
        ),
    ),
    ("ImportError", re.compile(r"cannot import name '\w+'.*")),
    ("ModuleNotFoundError", re.compile(r"No module named '[\w.]+'.*")),
)
#: Ends of sentences.
_SENTENCES: Final = re.compile(r"(?<=[。！？；])|(?<=[a-z)\]'\"`][.!?;]) +(?=[A-Z])")
#: The marks that a forum puts around a title.
_MARKS: Final = re.compile(
    r"^(?:# +)?(?:[\[【](?:Bug|Feature|Issue|Docs?|Help|Question)[^\]】]{0,16}[\]】]\s*[:：]?\s*)*"
    r"|\s*\[(?:Bug|Feature|Issue)\]$",
    re.IGNORECASE,
)
#: A title that asks, or reports trouble, in any words.
_TROUBLE: Final = re.compile(
    r"(?i:\[(?:bug|issue|help)|[?？]\s*$|\bnot\b|n't\b|\bun(?:able|expected)|\bproblem|\bissue"
    r"|\bbug\b|\bwrong|\bbroken|不|无法|没(?!有?问题)|异常|(?<!没)(?<!没有)问题|错|失败|求助|吗)"
)
#: Words with which a person states a cause, or which case works and which does not.
_DECIDES: Final = re.compile(
    r"(?i:\b(?:because|due to|caused by|root cause|turn(?:s|ed) out|downgrad\w+|roll(?:ing|ed) back"
    r"|after (?:up|down)grad\w+|works?(?:ed)? (?:fine|well|correctly|on|with|when|if|after)"
    r"|only (?:with|when|on|fails|happens)|but (?:with|on|not)|exceeds)\b)"
    r"|因为|由于|原因|导致|验证|解决了|可以解决|降级|降到|换成|升级后|正常|没问题|没有问题|冲突|只有|(?:而|但).{0,12}(?:不|可以)"
)
#: Words with which a person states what mended something, what will, or that it is meant so.
_SOLVES: Final = re.compile(
    r"(?i:\b(?:(?:fixed|resolved|solved|merged|supported) (?:in|by|via|with|since|from|it|this)"
    r"|(?:been|is|was|be|get) (?:fix(?:ed)?|resolved|solved|merged)"
    r"|(?:solution|work-?around|cause|reason) (?:is|was)"
    r"|(?:up|down)grad(?:e|ed|ing)|updat(?:e|ed|ing) (?:to|lmdeploy)|roll(?:ed|ing) back"
    r"|(?:please|you (?:can|could|may|should|must|need to|have to)|may|try to) (?:try|use|set"
    r"|install|pass|change|remove|specify|build|reinstall|update)"
    r"|it(?:'s| is) (?:normal|expected)|by design|is needed)\b)"
    r"|解决(?:了|方法|方案|办法)|原因(?:是|在于)|是.{1,24}的原因|修复|升级(?:到|至|一下)|更新到|降(?:级|到)"
    r"|[改换](?:成|为)|合入|发版|正常现象"
    r"|(?:推荐|建议|请(?!问)|试试|尝试|可以).{0,12}(?:装|设|改|加|升|换|编译)"
    r"|(?:推荐|建议|请|可以)使用 ?[#\w-]"
)
#: A sentence that asks, or that what follows completes.
_ASKS: Final = re.compile(r"[?？吗呢]\W*$|[:：]\s*$|什么|不知道|是否|能否|有没有|怎么|如何|^\W")
#: A heading, a picture, an address, a name with a date, or a few words.
_NO_SENTENCE: Final = re.compile(r"[#!<@\[]|\W*$|https?:|.{0,80} · |.{0,14}$|.*[:：]\s*$")
#: Thanks, with which people close a report.
_THANKS: Final = re.compile(r"(?i:\bthank)|感谢|谢谢")
_FENCE: Final = "```"
#: Lines that only a running program prints: a date, a level, a traceback, a bar.
_LOG: Final = re.compile(
    r"\[?\d{4}-\d\d-\d\d|(?:Collecting|Downloading|Requirement already|Looking in) \S"
    r"|(?!.*log.level).{0,60}?\b(?:INFO|WARN(?:ING)?|ERROR|DEBUG)\b|\[TM\]"
    r"|(?:\w+(?:Error|Exception) +)?Traceback|[\s|>+-]*File \"|Thread \S+ \(\w+\): |\*+ SIG"
    r"|Move \S+ to [CG]PU|.{0,200}?\d%\||.{0,240}?\wWarning: "
)
#: A heading, a comment of code, or a line of a log.
_NO_WORDS: Final = re.compile(rf"#|{_LOG.pattern}")
#: Symptoms that words alone describe only weakly.
_WEAK: Final = ("asks_support", "http_status", "not_released", "said_to_be_slow")
#: Lines of a program without a level or a date belong to a log that is so near.
_NEAR: Final = 20
_NEVER: Final = -1000
#: The title is among this many first rows.
_FIRST: Final = 3
#: The most sentences that are kept: a report has fewer.
_MOST: Final = 200
#: The characters of a line that are searched for sentences.
_LONGEST: Final = 1024

#: How much a sentence tells, the most first: a known message, symptom or exception; words of an
#: error, or a question; a title alone.
KNOWN, TROUBLE, TITLE = range(3)


class ToldLines:
    """The title, and sentences that report trouble or decide between causes."""

    def __init__(self) -> None:
        self.marks: list[tuple[int, LogEvent]] = []
        #: All sentences below the title.
        self.sentences: list[LogEvent] = []
        #: Sentences that state what mended it, and those that state a cause or a case that works.
        self.solves: list[LogEvent] = []
        self.decides: list[LogEvent] = []
        self.title: LogEvent | None = None
        #: Whether the report has lines of a program's log, and whether it ends among them.
        self.logs = False
        self.ends_in_log = False
        self._pasted = False
        self._last_log = _NEVER
        self._lines: set[int] = set()
        self._rows = 0

    def notice(self, line: int, text: str) -> None:
        """Read a row; inside a fence, or in a report without a title, it belongs to the log.

        The first row is always read, as it may be the whole report. Without a title it counts only
        if it has words that people use for a known problem.
        """
        self._rows += 1
        if self.title is None and self._rows <= _FIRST and text.startswith("# "):
            self.title = LogEvent(line, text, KnownMessage())
        if self.title is not None:
            self._follow_log(line, text)
        if text.startswith(_FENCE):
            self._pasted ^= text.count(_FENCE) % 2 == 1
            self.ends_in_log, self._last_log = False, _NEVER
        elif not self._pasted and (self.title or self._rows == 1) and len(self._lines) < _MOST:
            self._read(line, text)

    def has(self, line: int) -> bool:
        """Whether a person wrote the line, not a program."""
        return line in self._lines

    @property
    def title_is_past(self) -> bool:
        """Whether no later row can be the title."""
        return self._rows > _FIRST

    def _follow_log(self, line: int, text: str) -> None:
        """Note whether the report is within a program's log at this row."""
        if _LOG.match(text):
            self.logs, self._last_log = True, line
        near = 0 <= line - self._last_log <= _NEAR
        self.ends_in_log = near and (line == self._last_log or self._pasted or by_program(text))

    def _read(self, line: int, text: str) -> None:
        title = self.title is not None and self.title.line == line
        if not plain(text) if title else _NO_WORDS.match(text) or by_program(text):
            return
        if self.title:
            self._lines.add(line)
        sentences = [text] if title else _SENTENCES.split(text[:_LONGEST])
        for number, sentence in enumerate(sentences):
            self._take(LogEvent(line, " ".join(sentences[number:]), KnownMessage()), sentence)

    def _take(self, mark: LogEvent, text: str) -> None:
        """Take in a sentence; what is quoted of it goes on to the end of its line."""
        title = self.title is not None and self.title.line == mark.line
        message = message_in(text)
        if "Warning: " in message and not title:
            return
        hits = (message and hits_of(message)) or hits_of(text, told=True)
        mark = mark._replace(hits=hits)
        order = self._order(mark.row, text, message, title=title)
        if order is not None:
            self._lines.add(mark.line)
            self.marks.append((order, mark))
        if self.title is None or title:
            return
        if not _NO_SENTENCE.match(text):
            self.sentences.append(mark)
        if _ASKS.search(text.strip()) or _THANKS.search(text):
            return
        if _SOLVES.search(text):
            self.solves.append(mark)
        elif _DECIDES.search(text):
            self.decides.append(mark)

    def _order(self, row: Row | None, text: str, message: str, *, title: bool) -> int | None:
        """The rank of a sentence by how much it tells; None if it tells nothing."""
        if self.title is None:
            return KNOWN if row and row.rank == "told" else None
        if message or (row and (title or row.kind not in _WEAK)):
            return KNOWN
        if row or tells_of_error(without_zero_counts(text)) or (title and _TROUBLE.search(text)):
            return TROUBLE
        return TITLE if title else None


def message_in(text: str) -> str:
    """The program's message that a sentence quotes, with the exception's name; else empty."""
    if match := _NAMED.search(text):
        return (match[1] or match[2]).strip().rstrip("`")
    found = ((name, pattern.search(text)) for name, pattern in _NAMELESS)
    return next((f"{name}: {match[0]}" for name, match in found if match), "")


def said(text: str) -> str:
    """A person's words, with their place in the report, and without a forum's marks."""
    where = "report's title" if text.startswith("# ") else "text"
    return f"the {where} says: {plain(text)}"


def plain(text: str) -> str:
    """A person's line without a forum's marks."""
    return _MARKS.sub("", text).strip()
