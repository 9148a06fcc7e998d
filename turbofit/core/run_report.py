"""The types of ``run.json``, the record of a run of `serve`, as far as reports show them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from turbofit.core.struct import Struct


class RunFigure(Struct):
    """A forecast of the plan and the actual number, both in ``unit``.

    ``gpu`` is the machine's index of the GPU; None if the number is for the whole engine.
    """

    what: str
    forecast: int
    actual: int
    unit: Literal["bytes", "tokens"] = "bytes"
    gpu: int | None = None


class EngineRecord(Struct):
    """One engine after it became ready.

    ``seconds`` is the time of each phase of its start; ``beside`` has forecasts and actual numbers.
    """

    group: int
    seconds: dict[str, float] = msgspec.field(default_factory=dict)
    beside: tuple[RunFigure, ...] = ()


class RunMoment(Struct):
    """A phase of the engines, ``at`` seconds after the start of the attempt.

    ``used`` is the bytes in use on each GPU, by the GPU's index as text; empty on pretend GPUs.
    """

    phase: str
    at: float
    used: dict[str, int] = msgspec.field(default_factory=dict)


class RunAttempt(Struct):
    """One start of the engines of one plan, and its end.

    ``ended`` is None while the engines run, or if a signal ended them.
    """

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
    """Something that happened during a run, at the time ``at``."""

    at: str
    kind: str
    text: str


class RunReport(Struct):
    """The record of a run of `serve`, or of a trial of `tune` or `calibrate` (``command``).

    ``urls`` are the server's addresses. ``defaults`` describes the default values of requests.
    """

    schema: Literal["turbofit.run/1"] = "turbofit.run/1"
    turbofit_version: str
    started: str
    state: str
    model: str = ""
    command: str = "serve"
    pretend: bool = False
    lmdeploy: str = ""
    ended: str | dict[str, Any] | None = None
    urls: tuple[str, ...] = ()
    defaults: tuple[str, ...] = ()
    attempts: tuple[RunAttempt, ...] = ()
    events: tuple[RunEvent, ...] = ()

    @property
    def last(self) -> RunAttempt | None:
        """The latest attempt; None without an attempt."""
        return self.attempts[-1] if self.attempts else None

    @property
    def rows(self) -> tuple[tuple[int, RunFigure], ...]:
        """Forecasts and actual numbers of the latest attempt, each with its engine's group."""
        engines = self.last.engines if self.last else ()
        return tuple((engine.group, row) for engine in engines for row in engine.beside)
