"""A report whose log decides nothing: what its title tells, then what its sentences tell.

No line of the log tells of an error, or it is cut before it. The steps: look a person's line up in
the rows that a log's lines are looked up in; say what is told as told, with what others had who met
it; say beside it where the log is cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.diagnose.rules.causes import less_memory
from turbofit.diagnose.rules.draft import RuleAnswer, evidence, raised_in
from turbofit.diagnose.rules.figures import explanation_of
from turbofit.diagnose.rules.rules_torch import phase_of, program_of
from turbofit.diagnose.told import NAMED

if TYPE_CHECKING:
    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.event import LogEvent

_NO_LINE: Final = "no line of this log tells what failed"
_CUT: Final = "this log ends within a traceback, before the error itself"


def told_by(case: LogCase) -> RuleAnswer | None:
    """What the title says, else the text, where a row knows it or it names an exception."""
    answers = (_stated(case, mark) for mark in case.facts.told.marks)
    return next((answer for answer in answers if answer), None)


def _stated(case: LogCase, mark: LogEvent) -> RuleAnswer | None:
    draft, named = explanation_of(mark, case), NAMED.search(mark.text)
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
