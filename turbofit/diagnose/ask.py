"""Chooses what to ask for, and the first step, if a log does not prove its cause."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from turbofit.core.version import REFERENCE
from turbofit.diagnose.rules.causes import what_to_send
from turbofit.diagnose.rules.rules_told import STILL, ends, solution_of
from turbofit.diagnose.told import message_in
from turbofit.memory.versions import release
from turbofit.observe.log_events import PythonError

if TYPE_CHECKING:
    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.facts import LogFacts
    from turbofit.diagnose.rules.draft import RuleAnswer

#: What a text lacks: its end, with the error; any log; a line that tells of an error; or, if it
#: has such a line, the cause.
Lack = Literal["end", "log", "line", "cause"]
#: Kinds of answers that no row gave.
_UNKNOWN: Final = ("check_failed", "unknown", "")
#: A log with at most this many lines does not tell which program wrote it.
_SHORT: Final = 3


def lack_of(case: LogCase, draft: RuleAnswer) -> Lack:
    """What the log lacks that would tell the cause of an unknown error."""
    facts = case.facts
    if _names_error(facts, draft):
        return "cause"
    if ends(facts, draft.kind):
        return "end"
    return "log" if facts.told.title and not facts.told.logs else "line"


def _names_error(facts: LogFacts, draft: RuleAnswer) -> bool:
    """Whether the quoted line is a program's message, also if a person quotes it."""
    if not draft.evidence:
        return False
    if not facts.told.has(draft.line):
        return facts.cut_at is None
    of_row = draft.kind not in _UNKNOWN and draft.rank != "told"
    return of_row or bool(message_in(draft.quoted))


def to_send(case: LogCase, draft: RuleAnswer, what: str) -> tuple[str, ...]:
    """What would tell the cause, the most useful first; ``what`` is the answer so far."""
    lack = lack_of(case, draft)
    marks, text = [f"({lack})", *_circumstances(case, draft)], ""
    if lack in ("line", "cause"):
        text = f"{what} lmdeploy" if case.facts.subject.of_lmdeploy else what
    questions = what_to_send(text, marks)
    newer = _newer_release(case) if lack in ("log", "cause") else ()
    return (*newer, *questions)


def first_step(case: LogCase, draft: RuleAnswer, send: tuple[str, ...]) -> str:
    """The first step: what others tried, what the report says mended it, or what to send.

    If the text has no error, what others tried is no first step, except for a server that hangs,
    which writes no error; if the text was cut, its end is the first.
    """
    tried, solution = draft.changes if draft.possible else (), solution_of(case)
    lack = "still" if draft.kind in STILL else lack_of(case, draft)
    steps = {
        "cause": (*tried, solution, *send),
        "still": (solution, *tried, *send),
        "end": send,
        "log": (solution, *send),
        "line": (solution, *send),
    }
    return next(filter(None, steps[lack]), "")


def _circumstances(case: LogCase, draft: RuleAnswer) -> list[str]:
    """Words of the table for what is known beside the error's line."""
    facts, errors = case.facts, case.facts.every(PythonError)
    told = not draft.evidence or facts.told.has(draft.line)
    known = {
        "(still)": draft.kind in STILL,
        "(picture)": facts.mood.pictures and told,
        "(no traceback)": bool(errors) and not errors[-1][0].stack,
        "(short log)": facts.lines <= _SHORT and not facts.commanded,
    }
    return [word for word, holds in known.items() if holds]


def _newer_release(case: LogCase) -> tuple[str, ...]:
    """A question about the newest known release, if the log names an older one."""
    version = case.facts.subject.version
    if version is None or not (0, 0) < release(version) < release(REFERENCE):
        return ()
    return (
        f"whether a newer LMDeploy does the same: try it first, since this text names {version} and"
        f" turbofit knows {REFERENCE}",
    )
