"""The answer of a rule to a case, before advice and the log's own facts are added."""

from __future__ import annotations

from turbofit.core.process.hidden import without_keys
from turbofit.core.struct import Struct
from turbofit.diagnose.answer import Evidence, Holding, Missing
from turbofit.diagnose.event import LogEvent
from turbofit.diagnose.rules.causes import Rank
from turbofit.observe.stages import Phase

_SHOWN = 240
#: Innermost frames that are named of an exception.
_FRAMES = 3


class RuleAnswer(Struct):
    """A rule's answer. ``line`` is the line of the trouble; the earliest cause becomes the answer.

    If ``what`` is empty, the log proves no cause: ``possible`` and ``changes`` are then causes that
    other people had and changes that they tried. ``said`` is a row's quotation of its line.
    ``planned``: the answer needs a plan. ``by_others``: bytes per card that other processes held,
    which the plan must leave to them.
    """

    kind: str
    line: int
    phase: Phase = "unknown"
    what: str = ""
    said: str = ""
    rank: Rank = "cause"
    why: tuple[str, ...] = ()
    possible: tuple[str, ...] = ()
    held: tuple[Holding, ...] = ()
    missing: Missing | None = None
    missing_in_all: Missing | None = None
    changes: tuple[str, ...] = ()
    send: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    planned: bool = False
    by_others: int = 0

    @property
    def quoted(self) -> str:
        return next(row.text for row in self.evidence if row.line == self.line)


def raised_in(mark: LogEvent) -> tuple[str, ...]:
    """Where an exception was raised: the innermost frames of its traceback."""
    frames = [f"{frame.path}, in {frame.function}" for frame in mark.stack[-_FRAMES:]]
    return (f"it was raised in {' < '.join(reversed(frames))}",) if frames else ()


def evidence(mark: LogEvent, tells: str) -> Evidence:
    return evidence_at((mark.line, mark.text), tells)


def evidence_at(place: tuple[int, str], tells: str) -> Evidence:
    line, text = place
    return Evidence(line=line, text=without_keys(text.strip())[:_SHOWN], tells=tells)
