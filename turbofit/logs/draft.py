"""An answer to a case, before the plan, the first step and the log's own facts are added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.process.hidden import without_keys
from turbofit.logs.answer import Diagnosis, Evidence, Read
from turbofit.logs.causes import Rank
from turbofit.logs.death import Phase

if TYPE_CHECKING:
    from turbofit.logs.facts import LogEvent

_SHOWN: Final = 240
#: Innermost frames that are named of an exception.
_FRAMES: Final = 3


class Draft(Diagnosis):
    """``line`` is the line of the trouble; the earliest cause becomes the answer.

    If ``what`` is empty, the log proves no cause: ``possible`` and ``changes`` are then causes that
    other people had and changes that they tried. ``planned``: the answer needs a plan.
    ``by_others``: bytes per card that other processes held, which the plan must leave to them.
    ``short``: the run lacked memory, so that its own account may have cures. ``free``: the step
    that frees cards which others hold, or seem to; it goes before all others.
    """

    line: int
    phase: Phase = "unknown"
    what: str = ""
    rank: Rank = "cause"
    possible: tuple[str, ...] = ()
    planned: bool = False
    by_others: int = 0
    short: bool = False
    free: str = ""
    read: Read = Read(lines=0)

    @property
    def quoted(self) -> str:
        return next((row.text for row in self.evidence if row.line == self.line), "")


def raised_in(mark: LogEvent) -> tuple[str, ...]:
    """Where an exception was raised: the innermost frames of its traceback."""
    frames = [f"{frame.path}, in {frame.function}" for frame in mark.stack[-_FRAMES:]]
    return (f"it was raised in {' < '.join(reversed(frames))}",) if frames else ()


def evidence(mark: LogEvent, tells: str) -> Evidence:
    return evidence_at((mark.line, mark.text), tells)


def evidence_at(place: tuple[int, str], tells: str) -> Evidence:
    line, text = place
    return Evidence(line=line, text=without_keys(text.strip())[:_SHOWN], tells=tells)
