"""The parts of ``run.json``, the record of a run of `serve`, that reports show."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from turbofit.core.struct import Struct, const

RUN_SCHEMA: Final = "turbofit.run/1"


class RunFigure(Struct):
    """A figure: forecast and actual; ``gpu`` is the machine's index, or None for the engine's."""

    what: str
    forecast: int
    actual: int
    unit: Literal["bytes", "tokens"] = "bytes"
    gpu: int | None = None


class EngineRecord(Struct):
    """One engine that became ready: seconds of each phase of its start, forecast and actual."""

    group: int
    seconds: dict[str, float] = msgspec.field(default_factory=dict)
    beside: tuple[RunFigure, ...] = ()


class RunMoment(Struct):
    """A phase of the engines, ``at`` seconds after the start of the attempt.

    ``used``: bytes in use on each GPU, by its index as text; empty on pretend GPUs.
    """

    phase: str
    at: float
    used: dict[str, int] = msgspec.field(default_factory=dict)


class RunAttempt(Struct):
    """One start of one plan; ``ended``: how, where it did not end by a signal."""

    started: str
    number: int = 0
    why: str = ""
    changes: dict[str, Any] = msgspec.field(default_factory=dict)
    engines: tuple[EngineRecord, ...] = ()
    moments: tuple[RunMoment, ...] = ()
    ended: dict[str, Any] | None = None
    restarts: int = 0
    memory_back: bool | None = None


class RunEvent(Struct):
    """Something that happened while it ran."""

    at: str
    kind: str
    text: str


class RunReport(Struct):
    """A run's record; ``urls``: where it answers; ``defaults``: those of requests, in words."""

    schema: Annotated[str, const(RUN_SCHEMA)]
    turbofit_version: str
    started: str
    state: str
    model: str = ""
    pretend: bool = False
    lmdeploy: str = ""
    ended: str | dict[str, Any] | None = None
    urls: tuple[str, ...] = ()
    defaults: tuple[str, ...] = ()
    attempts: tuple[RunAttempt, ...] = ()
    events: tuple[RunEvent, ...] = ()

    @property
    def last(self) -> RunAttempt | None:
        """The latest attempt; None if there was none."""
        return self.attempts[-1] if self.attempts else None

    @property
    def rows(self) -> tuple[tuple[int, RunFigure], ...]:
        """Figures of the latest attempt, each with the group of its engine."""
        engines = self.last.engines if self.last else ()
        return tuple((engine.group, row) for engine in engines for row in engine.beside)
