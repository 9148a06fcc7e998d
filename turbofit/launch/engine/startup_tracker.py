"""How far an engine has come, by its log, and which lines say what goes wrong."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Literal

from turbofit.observe.forecast import cache_beside, tokens_beside
from turbofit.observe.log_events import (
    Backpressure,
    CacheBudget,
    CacheFrame,
    CheckFailed,
    CudaError,
    EngineFallback,
    Frame,
    LoadingWeights,
    LoopFailed,
    LostLock,
    NcclError,
    NoCache,
    PythonError,
    ServerUp,
    Slab,
    Starting,
    TorchMemory,
    VisionFrame,
    WarmingUp,
    WarmupFinished,
    WarmupLength,
    WarmupLengths,
)
from turbofit.observe.log_reader import read_line

if TYPE_CHECKING:
    from turbofit.core.plan import Plan
    from turbofit.core.struct import Struct

__all__ = ["EnginePhase", "StartupTracker"]

EnginePhase = Literal["starting", "weights", "cache", "warm-up", "serving", "check", "ready"]

#: The hang prints tens of thousands of lines a second; a healthy warm-up never waits for memory,
#: since its requests come one at a time.
_HANG_LINES: Final = 1000
_HANG_SECONDS: Final = 2.0
#: What ended the PyTorch engine's loop is printed with the line that says so.
_WORDS_SECONDS: Final = 2.0
#: What only LMDeploy's PyTorch engine says; its own figures are INFO, which would print prompts.
_OF_PYTORCH: Final = (
    LoadingWeights, WarmingUp, LoopFailed, NoCache, LostLock, CacheFrame, VisionFrame,
)  # fmt: skip
#: Torch's exception itself, raised in Python or through C++.
_RAISED: Final = re.compile(r"(?:torch\.(?:cuda\.)?)?OutOfMemoryError: |\s*what\(\): ")


class StartupTracker:
    """Follows one engine's log; ``see`` each run of lines, then ask."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.phase: EnginePhase = "starting"
        self.budget: CacheBudget | None = None
        self.slab: Slab | None = None
        self.warming: int | None = None
        self.fallback: EngineFallback | None = None
        self._loop_failed: float | None = None
        self._begin_evidence()
        self._waits = 0
        self._waiting_since: float | None = None

    def see(self, text: str, count: int, now: float) -> list[str]:
        """Take in a line that came ``count`` times in a row; returns what people should read."""
        event = read_line(text)
        if event is None or (isinstance(event, _OF_PYTORCH) and not self._plan.engine.is_pytorch):
            return []
        if isinstance(event, TorchMemory) and not _RAISED.match(text):
            return []  # some message quotes the words
        if isinstance(event, LoopFailed) and self._loop_failed is None:
            self._evidence_at = self._loop_failed = now
        if isinstance(event, Backpressure):
            self._wait(event, count, now)
            return []
        self._waits, self._waiting_since = 0, None
        if not self._is_evidence(event):
            return self._progress(event)
        self._evidence_at = now
        self._evidence(event)
        return []

    def survived(self, until: float) -> None:
        """Forget what an engine printed before a time at which it answered a request."""
        if self._evidence_at < until:
            self._begin_evidence()

    def hangs(self, now: float) -> bool:
        """Whether the warm-up waits for cache that will never be free."""
        return (
            self._waiting_since is not None
            and self._waits >= _HANG_LINES
            and now - self._waiting_since >= _HANG_SECONDS
        )

    def loop_failed(self, now: float) -> bool:
        """Whether the PyTorch engine's loop has ended, and the reason was read."""
        if self._loop_failed is None:
            return False
        return self.fault is not None or now - self._loop_failed >= _WORDS_SECONDS

    @property
    def failing(self) -> bool:
        """Whether the loop has ended and the reason may still be printed."""
        return self._loop_failed is not None

    @property
    def cache_surplus(self) -> int | None:
        """Bytes a GPU that the cache holds beyond the plan: more was free than it counted on.

        None for LMDeploy's PyTorch engine, which does not tell how large its cache is.
        """
        if self.budget is None:
            return None if self._plan.engine.is_pytorch else 0
        return max(0, self.budget.budget - self._plan.kv.region_bytes)

    def cached_tokens(self) -> int | None:
        """Tokens that the cache holds by the engine's own figures."""
        if self.budget is None or self.slab is None:
            return None
        return tokens_beside(self._plan, self.budget, self.slab).actual

    def _wait(self, event: Backpressure, count: int, now: float) -> None:
        if self.phase != "warm-up" or event.cause != "memory":
            return
        self._waits += count
        if self._waiting_since is None:
            self._waiting_since = now

    @staticmethod
    def _is_evidence(event: Struct) -> bool:
        return isinstance(
            event,
            CudaError | CheckFailed | NcclError | TorchMemory | Frame | PythonError
            | NoCache | CacheFrame | VisionFrame | LostLock,
        )  # fmt: skip

    def _begin_evidence(self) -> None:
        """Begin without any evidence of why the engine ends."""
        self.fault: CudaError | CheckFailed | NcclError | TorchMemory | None = None
        self.error: PythonError | None = None
        self.frames: list[str] = []
        self.no_cache = ""
        self.raced = False
        self.in_vision = False
        self._evidence_at = float("-inf")
        self._loop_failed = None

    def _evidence(self, event: Struct) -> None:
        """Keep the first fault, the frames after it and the last Python error."""
        if isinstance(event, LostLock):
            self.raced = self.phase == "starting"
        elif isinstance(event, CacheFrame):
            self.phase = "cache" if self.phase == "weights" else self.phase
        elif isinstance(event, VisionFrame):
            self.in_vision = self.in_vision or self.fault is None
        elif isinstance(event, NoCache):
            self.no_cache = event.what
        elif isinstance(event, Frame):
            self.frames.append(event.name)
        elif isinstance(event, PythonError):
            self.error = event
            if event.out_of_memory:
                self.fault = self.fault or TorchMemory(message=event.message)
        elif isinstance(event, CudaError | CheckFailed | NcclError | TorchMemory):
            self.fault = self.fault or event

    def _progress(self, event: Struct) -> list[str]:
        if isinstance(event, LoadingWeights):
            return self._enter("weights")
        if isinstance(event, WarmingUp):
            return self._enter("warm-up")
        if isinstance(event, EngineFallback):
            self.fallback = event
        if isinstance(event, Starting):
            return self._enter("weights")
        if isinstance(event, CacheBudget) and self.budget is None:
            self.budget = event
            figures = [beside.text for beside in cache_beside(self._plan, event)]
            return [*self._enter("cache"), *figures]
        if isinstance(event, Slab) and self.slab is None and self.budget is not None:
            self.slab = event
            return [tokens_beside(self._plan, self.budget, event).text]
        if isinstance(event, WarmupLengths):
            return self._enter("warm-up")
        if isinstance(event, WarmupLength):
            self.warming = event.tokens
        if isinstance(event, WarmupFinished | ServerUp):
            return self._enter("serving")
        return []

    def _enter(self, phase: EnginePhase) -> list[str]:
        """Enter a phase once: of several ranks the first that prints it counts."""
        if self.phase == phase:
            return []
        self.phase = phase
        return [f"phase: {phase}"]
