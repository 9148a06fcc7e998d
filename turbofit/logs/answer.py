"""The answer of `turbofit diagnose` (`Diagnosis`), and its drafts, the possible answers.

`logs.explain` adds a plan, the first step and the log's own facts to the best draft.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from msgspec import field

from turbofit.core.engine_end import Phase
from turbofit.core.plan import Remedy
from turbofit.core.struct import Printed, Struct
from turbofit.logs.causes import Rank
from turbofit.logs.keys import without_keys

if TYPE_CHECKING:
    from turbofit.logs.facts import LogEvent
    from turbofit.logs.subject import Place

NOT_KNOWN: Final = "turbofit does not know the cause from this log"
_SHOWN: Final = 240
#: The most frames of a traceback that an answer names, from the innermost on.
_FRAMES: Final = 3


class Evidence(Struct):
    """A line of the log, its number from 1, and its meaning in ``tells``."""

    line: int
    text: str
    tells: str


class Holding(Struct):
    """A holder of memory on a GPU, with its bytes; None for a fact that the log does not say."""

    who: str
    bytes: int | None
    gpu: int | None = None
    lines: tuple[int, ...] = ()


class Missing(Struct):
    """The bytes that were missing, and the source of that number.

    ``basis``: ``log`` (the log's own figures; torch rounds each figure to hundredths of its unit),
    ``formula`` (the log's figures and turbofit's account of the engine) or ``unknown``. A number by
    a formula may be too low by up to ``doubt`` bytes.
    """

    bytes: int | None
    basis: Literal["log", "formula", "unknown"]
    note: str
    doubt: int = 0


class Others(Struct):
    """Causes that other people found for the same message; the message itself proves no cause.

    ``message`` identifies the message, for scripts. ``had``: the causes, the likeliest first; the
    list is never complete. ``tried``: steps that helped, or that showed the cause.
    """

    message: str
    had: tuple[str, ...]
    tried: tuple[str, ...]


class Advice(Struct):
    """A run that works by the account for the model and machine, or the reason why none works.

    The run has the change of the diagnosis's first step. ``fits`` is None if turbofit could make no
    plan, or if the log itself contradicts the plan. ``settings``: LMDeploy's important options.
    ``command`` starts the run, without environment variables. ``note``: what a user must know
    before he starts the run. ``in_place_of``: the log's model, if the run has a lighter checkpoint
    because that model does not fit; else empty.
    """

    model: str
    on: str
    fits: bool | None
    verdict: str
    settings: dict[str, object] = field(default_factory=dict)
    command: str = ""
    note: str = ""
    remedies: tuple[Remedy, ...] = ()
    in_place_of: str = ""


class Read(Struct):
    """The log's facts about the run; None, or empty, for a fact that the log does not say."""

    lines: int
    engine: str | None = None
    version: str | None = None
    model: str | None = None
    machine: str | None = None
    tp: int | None = None
    settings: dict[str, object] = field(default_factory=dict)


class Diagnosis(Printed, Struct):
    """The answer to a log.

    ``kind`` names the cause if the log or the account proves it; the names are stable, for scripts.
    Otherwise ``kind`` is ``unknown``: ``what`` quotes the error, ``send`` asks for more facts, and
    ``others`` has the causes that other people found for the same message. ``changes``: all steps
    in order. ``first``: the first step; empty without a step, as for a healthy log.
    """

    schema: str = "turbofit.diagnosis/1"
    kind: str
    phase: Phase
    what: str
    why: tuple[str, ...] = ()
    others: Others | None = None
    held: tuple[Holding, ...] = ()
    missing: Missing | None = None
    missing_in_all: Missing | None = None
    changes: tuple[str, ...] = ()
    would_work: Advice | None = None
    send: tuple[str, ...] = ()
    first: str = ""
    unknown: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    read: Read

    @property
    def known(self) -> bool:
        """Whether the log proves a cause, or that nothing failed."""
        return self.kind != "unknown"


class Draft(Diagnosis):
    """A possible answer to a log; `explain` makes one of them the answer.

    ``line``: the number of the line that reports the trouble. ``where``: the beginning of an answer
    without a cause, which names inside whose code it failed, if the stack shows it. ``by_row``: a
    row of `presets/causes.yaml` knows the words of this line, not only its form and place. If
    ``what`` is empty, the log proves no cause: ``possible`` then has causes that other people had,
    and ``changes`` has changes that they tried. ``planned``: the answer needs a plan.
    ``by_others``: bytes of each card that the plan leaves to other processes. ``short``: the run
    lacked memory, so other settings may cure it. ``unsized``: the run lacked memory for the first
    blocks of a cache, and a larger share cures it. ``free``: the step that frees cards from other
    processes; it comes before all other steps. ``all_own``: the log shows that nobody else held the
    card. ``emptied``: the plan is for empty cards, after the step ``free``. ``contradicts``: the
    log's figures contradict turbofit's account, so that the account proves no step and no plan.
    """

    line: int
    phase: Phase = "unknown"
    what: str = ""
    where: str = NOT_KNOWN
    rank: Rank = "cause"
    by_row: bool = False
    possible: tuple[str, ...] = ()
    planned: bool = False
    by_others: int = 0
    short: bool = False
    unsized: bool = False
    free: str = ""
    all_own: bool = False
    emptied: bool = False
    contradicts: bool = False
    read: Read = Read(lines=0)

    @property
    def loading(self) -> bool:
        """Whether the run may have died while it loaded its weights."""
        return self.phase in ("weights", "unknown")

    @property
    def quoted(self) -> str:
        return next((row.text for row in self.evidence if row.line == self.line), "")


def raised_in(mark: LogEvent) -> tuple[str, ...]:
    """Return one sentence that names the innermost frames of an exception; empty without frames."""
    frames = [f"{frame.path}, in {frame.function}" for frame in mark.stack[-_FRAMES:]]
    return (f"it was raised in {' < '.join(reversed(frames))}",) if frames else ()


def evidence(place: LogEvent | Place, tells: str) -> Evidence:
    return Evidence(line=place[0], text=without_keys(place[1].strip())[:_SHOWN], tells=tells)
