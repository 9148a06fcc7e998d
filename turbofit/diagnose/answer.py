"""What `turbofit diagnose` answers: one struct, from which text and JSON are made."""

from __future__ import annotations

from typing import Final, Literal

from msgspec import field

from turbofit.core.plan import Remedy
from turbofit.core.struct import Struct
from turbofit.observe.stages import Phase

DIAGNOSIS_SCHEMA: Final = "turbofit.diagnosis/1"


class Evidence(Struct):
    """A line of the log, counted from 1, and what it tells."""

    line: int
    text: str
    tells: str


class Holding(Struct):
    """Somebody who held memory on a GPU, in bytes; None where the log does not say."""

    who: str
    bytes: int | None
    gpu: int | None = None
    lines: tuple[int, ...] = ()


class Missing(Struct):
    """Bytes that were missing, and how that is known.

    ``basis``: ``log`` (its own figures, rounded as it rounds them), ``formula`` (the log's figures
    and turbofit's account of the engine), ``unknown``. ``doubt`` is how much more it may have been.
    """

    bytes: int | None
    basis: Literal["log", "formula", "unknown"]
    note: str
    doubt: int = 0


class Others(Struct):
    """Causes that others had of a message that does not tell its cause: nothing about this log.

    ``message`` names it, for scripts; ``had`` are causes, the likeliest first, and never all of
    them; ``tried`` is what told them apart or helped.
    """

    message: str
    had: tuple[str, ...]
    tried: tuple[str, ...]


class Advice(Struct):
    """What would have worked: a plan for the model and machine, or what stands in its way.

    ``fits`` is None where no plan could be made, or where the log itself speaks against it.
    ``settings`` are LMDeploy's options that matter; ``command`` starts it, without the environment;
    ``note`` says what is to be known before they are used.
    """

    model: str
    on: str
    fits: bool | None
    verdict: str
    settings: dict[str, object] = field(default_factory=dict)
    command: str = ""
    note: str = ""
    remedies: tuple[Remedy, ...] = ()


class Read(Struct):
    """What the log says about the run; None or empty where it does not."""

    lines: int
    engine: str | None = None
    version: str | None = None
    model: str | None = None
    machine: str | None = None
    tp: int | None = None
    settings: dict[str, object] = field(default_factory=dict)


class Diagnosis(Struct):
    """The answer. ``kind`` is the cause, stable for scripts, where the log itself proves it.

    Else it is ``unknown``: ``what`` quotes the error, ``send`` says what would tell more, and
    ``others`` what others had who met the same message. ``send`` stands beside a lack of memory
    too, where nothing says what ran out.
    """

    schema: str = DIAGNOSIS_SCHEMA
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
    unknown: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    read: Read

    @property
    def known(self) -> bool:
        """Whether the log proves a cause, or that nothing failed."""
        return self.kind != "unknown"
