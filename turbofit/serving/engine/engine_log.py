"""Reads an engine's growing log: the phases of the start, and the reason of the end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from turbofit.core.engine_end import End
from turbofit.core.plan import EnginePlan, Plan
from turbofit.core.run_report import RunFigure
from turbofit.core.struct import Struct
from turbofit.core.units import MIB
from turbofit.logs.death import Course, Exit, Stage, after, death
from turbofit.logs.log_events import (
    Backpressure,
    CacheBudget,
    CacheFrame,
    CheckFailed,
    CudaError,
    EngineFallback,
    Frame,
    ImagesPrepared,
    LoadingWeights,
    LoopFailed,
    LostLock,
    NcclError,
    NoCache,
    PythonError,
    PythonFrame,
    Slab,
    VisionFrame,
    WarmingUp,
    WarmupLength,
    WarmupLengths,
)
from turbofit.logs.log_reader import read_line
from turbofit.machine.torch_memory import TorchMemory
from turbofit.memory.engines import engine_of
from turbofit.serving.calibration import compare_cache, compare_tokens, in_words

#: The warm-up hangs if it waits for memory in so many lines and for so many seconds. A hang prints
#: tens of thousands of lines a second. A healthy warm-up never waits for memory, since its requests
#: come one at a time.
_HANG_LINES: Final = 1000
_HANG_SECONDS: Final = 2.0
#: Seconds in which the PyTorch engine prints the reason after its loop has ended.
_WORDS_SECONDS: Final = 2.0
#: Events that count only with LMDeploy's PyTorch engine. The log has no figures of this engine,
#: since the level INFO would also print clients' prompts.
_OF_PYTORCH: Final = (
    LoadingWeights, WarmingUp, LoopFailed, NoCache, LostLock, CacheFrame, VisionFrame,
)  # fmt: skip
#: The beginning of torch's exception, raised in Python or in C++.
_RAISED: Final = re.compile(r"(?:torch\.(?:cuda\.)?)?OutOfMemoryError: |\s*what\(\): ")
#: Events that may explain an end. The first `_MOST` events are kept, since the first fault counts.
_EVIDENCE: Final = (
    CheckFailed, CudaError, Frame, LostLock, NcclError, NoCache, PythonError, PythonFrame,
    TorchMemory, VisionFrame,
)  # fmt: skip
_MOST: Final = 1000
#: Events with figures that explain a hang; the last event of each type is kept.
_OF_CACHE: Final = (CacheBudget, Slab, WarmupLengths, WarmupLength)


class StartupTracker:
    """Follows the log of one start of an engine; `see` takes a line, and how often it came."""

    def __init__(self, plan: Plan, engine: EnginePlan, log: Path, began: float = 0.0) -> None:
        self.plan, self.engine, self.log = plan, engine, log
        #: The start's phases so far, with the time of each beginning.
        self.phases: list[tuple[Stage, float]] = [("starting", began)]
        #: The cache's size by the log.
        self.budget: CacheBudget | None = None
        #: The engine's figures so far, each with the plan's forecast.
        self.figures: list[RunFigure] = []
        #: The tokens of the warm-up's present forward, if the log shows them.
        self.warming: int | None = None
        #: LMDeploy's reason to run its PyTorch engine instead of TurboMind; empty without a reason.
        self.fallback = ""
        #: The warm-up's lines in a row about a wait for memory, and the time of the first of them.
        self._waits = 0
        self._waiting_since: float | None = None
        self._of_cache: dict[type, Struct] = {}
        #: The time at which the PyTorch engine's loop failed.
        self._loop_failed: float | None = None
        self._begin_evidence()

    def see(self, text: str, count: int, now: float) -> list[str]:
        """Process a line that was printed ``count`` times in a row; return messages for people."""
        event = read_line(text)
        if event is None or (isinstance(event, _OF_PYTORCH) and not self.plan.backend.is_pytorch):
            return []
        if isinstance(event, TorchMemory) and not _RAISED.match(text):
            return []  # a message that only quotes torch's exception
        if isinstance(event, Backpressure):
            if self.phase == "warm-up" and event.cause == "memory":
                self._waits += count
                self._waiting_since = now if self._waiting_since is None else self._waiting_since
            return []
        self._waits, self._waiting_since = 0, None
        if isinstance(event, LoopFailed):
            self._loop_failed = now if self._loop_failed is None else self._loop_failed
        elif isinstance(event, _EVIDENCE):
            if len(self._evidence) < _MOST:
                self._evidence.append(event)
        else:
            return self._progress(event, now)
        self._evidence_at = now
        return []

    @property
    def phase(self) -> Stage:
        return self.phases[-1][0]

    def enter(self, phase: Stage, now: float) -> list[str]:
        """Enter a phase and return a line for people; return no line if the phase is not new."""
        if self.phase == phase:
            return []
        self.phases.append((phase, now))
        return [f"phase: {phase}"]

    def survived(self, until: float) -> None:
        """Forget evidence from before ``until``: at this time the engine answered a request."""
        if self._evidence_at < until:
            self._begin_evidence()

    def hangs(self, now: float) -> bool:
        """Return whether the warm-up waits for ever, for room in a cache that is too small."""
        since = self._waiting_since
        return since is not None and self._waits >= _HANG_LINES and now - since >= _HANG_SECONDS

    def loop_failed(self, now: float) -> bool:
        """Return whether the PyTorch engine's loop has ended with a known or overdue reason."""
        if self._loop_failed is None:
            return False
        explained = Course(self._evidence).fault is not None
        return explained or now - self._loop_failed >= _WORDS_SECONDS

    @property
    def failing(self) -> bool:
        """True if the PyTorch engine's loop has ended, with or without a printed reason."""
        return self._loop_failed is not None

    @property
    def cache_is_larger(self) -> bool:
        """True if the cache is larger than planned, or has an unknown size (PyTorch engine)."""
        if self.budget is None:
            return self.plan.backend.is_pytorch
        return self.budget.budget - self.engine.kv.region_bytes > MIB

    def cached_tokens(self) -> int | None:
        """Return the tokens of the cache by the engine's figures; None without figures."""
        return next((figure.actual for figure in self.figures if figure.unit == "tokens"), None)

    def death(self, seen: Exit | None = None) -> End:
        """Return the engine's end with the reason in its log; the hint names the log file.

        ``seen`` is how the engine's process exited, None if unknown.
        """
        events = [*self._of_cache.values(), *self._evidence]
        if self._waits and not self._evidence:
            events.append(Backpressure(cause="memory"))
        known = engine_of(self.plan), self.engine.settings
        end = death(Course(events, self.phase), self.plan, seen=seen, known=known)
        hints = (end.hint, f"the engine's log is {self.log}")
        return replace(end, hint="; ".join(filter(None, hints)))

    def _begin_evidence(self) -> None:
        self._evidence: list[Struct] = []
        self._evidence_at = float("-inf")
        self._loop_failed = None

    def _progress(self, event: Struct, now: float) -> list[str]:
        """Enter the phase of an event; return lines for people about the event."""
        if isinstance(event, _OF_CACHE):
            self._of_cache[type(event)] = event
        match event:
            case EngineFallback():
                self.fallback = event.message
            case ImagesPrepared():
                return [f"images: {event.how}"]
            case WarmupLength():
                self.warming = event.tokens
        lines = self.enter(after(self.phase, event), now)
        # Only a traceback shows that the PyTorch engine was allocating its cache: too late to tell.
        return [] if isinstance(event, CacheFrame) else [*lines, *self._figures(event)]

    def _figures(self, event: Struct) -> list[str]:
        """Return lines that compare the cache's figures in an event with the forecast.

        The cache's size and the block sizes are compared once each; other events give no lines.
        """
        match event:
            case CacheBudget() if self.budget is None:
                self.budget = event
                compared = list(compare_cache(self.engine, event))
            case Slab() if self.budget is not None and self.cached_tokens() is None:
                compared = [compare_tokens(self.plan, self.engine, self.budget, event)]
            case _:
                return []
        self.figures += compared
        return list(map(in_words, compared))


class EndedError(Exception):
    """An engine ended, and a restart would not help."""

    def __init__(self, end: End) -> None:
        super().__init__(end.message)
        self.end = end


def stalled_end(what: str, log: Path) -> End:
    return End(kind="stalled", message=what, hint=f"the engine's log is {log}")


def silence_words(plan: Plan, engine: EnginePlan, phase: str, seconds: float) -> str:
    """Return a message with possible reasons of a starting engine's silence of ``seconds``."""
    text = f"silent for {seconds:.0f} s in phase {phase}"
    text += "; weights may come from a slow disk" if phase == "weights" else ""
    if engine.settings.tp > 1 and plan.backend.is_pytorch:
        return f"{text}; Ray may wait for half an hour for GPUs that another process holds"
    if engine.settings.tp > 1 and engine.settings.communicator == "nccl":
        return (
            f"{text}; NCCL may wait for ever if GPUs do not reach each other (IOMMU, ACS): if the "
            "memory in use does not grow, try NCCL_P2P_DISABLE=1, and see turbofit doctor"
        )
    return text


def fallback_end(tracker: StartupTracker) -> End:
    """Return the end of a start in which LMDeploy chose its PyTorch engine against the plan."""
    return End(
        kind="refused",
        message="LMDeploy would run its PyTorch engine, and the plan is for TurboMind: "
        f"{tracker.fallback}",
        hint="TurboMind needs NVIDIA's driver and LMDeploy's own CUDA libraries; "
        f"the log is {tracker.log}",
    )
