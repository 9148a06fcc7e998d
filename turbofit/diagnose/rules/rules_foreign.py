"""A log of another program: one line about it, and no cause."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.diagnose.rules.draft import RuleAnswer, evidence
from turbofit.observe.log_events import PythonError, TorchMemory

if TYPE_CHECKING:
    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.event import LogEvent


def foreign_answer(case: LogCase, name: str) -> RuleAnswer:
    """One line on a log of another program: its version and its last error, and no cause."""
    version = case.facts.subject.foreign.version(name)
    program = f"{name} {version}" if version else name
    last = _last(case)
    if last is None:
        what = (
            f"a log of {program}, which turbofit does not explain: no line of it tells of an error"
        )
        return RuleAnswer(kind="foreign", line=0, what=what)
    row = evidence(last, "the last error")
    return RuleAnswer(
        kind="foreign",
        line=last.line,
        what=f"a log of {program}, which turbofit does not explain; its last error: {row.text}",
        evidence=(row,),
        planned=name == case.facts.subject.foreign.engine,
    )


def _last(case: LogCase) -> LogEvent | None:
    """The line to quote: that which has sizes of memory, else the last exception, else a line."""
    facts, event = case.facts, case.event
    short = [mark for mark, _ in facts.every(TorchMemory)]
    raised = [mark for mark in event.marks if isinstance(mark.event, PythonError)]
    lines = [*event.marks[-1:], *raised[-1:]] if event.outcome == "fatal" else []
    known = short or sorted(lines, key=lambda mark: mark.line)[-1:]
    return known[-1] if known else facts.mood.last_complaint or facts.mood.last_refusal
