"""What people tell beside a log: the title of a report, and the sentences around what they pasted.

It answers where no line of the log decides: none tells of an error, or the log is cut before it.
The steps: find the person's lines; look them up in the rows that a log's lines are looked up in;
say what is told as told, with what others had who met it, and beside it where the log is cut.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.diagnose.event import LogEvent
from turbofit.diagnose.rows import by_program
from turbofit.diagnose.rules.causes import hits_of, less_memory
from turbofit.diagnose.rules.draft import RuleAnswer, evidence, raised_in
from turbofit.diagnose.rules.figures import explanation_of
from turbofit.diagnose.rules.rules_torch import phase_of, program_of
from turbofit.observe.log_events import KnownMessage

if TYPE_CHECKING:
    from turbofit.diagnose.case import LogCase

#: An exception by its name, within a sentence.
_NAMED: Final = re.compile(r"(?:\w+\.)*[A-Z]\w*(?:Error|Exception): .+")
_FENCE: Final = "```"
#: Sentences that are kept: more are no report.
_MOST: Final = 200
_NO_LINE: Final = "no line of this log tells what failed"
_CUT: Final = "this log ends within a traceback, before the error itself"


class ToldLines:
    """The title, and sentences that a row knows or that name an exception, in their order."""

    def __init__(self) -> None:
        self.marks: list[LogEvent] = []
        self._titled = self._fenced = False
        self._first = True

    def notice(self, line: int, text: str) -> None:
        """Take in any row; within a fence, and where no person wrote a title, it is the log's."""
        title = text.startswith("# ")
        first, self._first = self._first, False
        self._titled = self._titled or title
        if text.startswith(_FENCE):
            self._fenced = not self._fenced
        elif (title or ((self._titled or first) and not by_program(text))) and not self._fenced:
            hits = hits_of(text, told=True)
            if len(self.marks) < _MOST and (hits or _NAMED.search(text)):
                self.marks.append(LogEvent(line, text, KnownMessage(), (), "", hits))

    def has(self, line: int) -> bool:
        return any(mark.line == line for mark in self.marks)


def told_by(case: LogCase) -> RuleAnswer | None:
    """What the title says, else the text, where a row knows it or it names an exception."""
    answers = (_stated(case, mark) for mark in case.facts.told.marks)
    return next((answer for answer in answers if answer), None)


def _stated(case: LogCase, mark: LogEvent) -> RuleAnswer | None:
    draft, named = explanation_of(mark, case), _NAMED.search(mark.text)
    if draft is None and named is None:
        return None
    draft = draft or RuleAnswer(kind="check_failed", line=mark.line)
    cut, changes = case.facts.cut_at, draft.changes
    phase = phase_of(cut.stack) if cut else "unknown"
    if cut and draft.kind == "out_of_memory" and phase != "unknown":
        changes = less_memory(program_of(cut.stack, case.facts.subject), phase)
    return replace(
        draft,
        phase="unknown",
        what=f"{_CUT if cut else _NO_LINE}; {said(evidence(mark, '').text)}",
        why=(f"its last call is: {evidence(cut, '').text}", *raised_in(cut)) if cut else (),
        possible=draft.possible or tuple(filter(None, (draft.what,))),
        changes=changes,
        evidence=(evidence(mark, "what the report tells"),)
        + ((evidence(cut, "the last call that it shows"),) if cut else ()),
    )


def said(text: str) -> str:
    """A person's line, with where it stands."""
    title = text.removeprefix("# ")
    return f"the {'text' if title == text else 'title'} says: {title}"
