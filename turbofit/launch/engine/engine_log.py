"""Reads from an engine's log how far it has come and why it ended, in words for people.

The reason comes from its exit code, its phase and its last lines; on pretend GPUs the account adds
which GPU, which call, and how many bytes were missing.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from turbofit.core.engine_end import End
from turbofit.core.units import MIB, format_bytes
from turbofit.memory.engines import engine_of
from turbofit.observe.calibration import cache_beside, in_words, tokens_beside
from turbofit.observe.engine_end import end_kind, exit_words, told_kind
from turbofit.observe.log_events import (
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
    Slab,
    TorchMemory,
    VisionFrame,
    WarmingUp,
    WarmupLength,
)
from turbofit.observe.log_reader import read_line
from turbofit.observe.stages import (
    begins,
    is_vision,
    last_words,
    out_of_memory,
    phase_of_death,
    when,
)

if TYPE_CHECKING:
    from pathlib import Path

    from turbofit.core.plan import Plan
    from turbofit.core.run_report import RunFigure
    from turbofit.core.struct import Struct
    from turbofit.observe.stages import Phase, Stage

#: A hang prints tens of thousands of lines a second; a healthy warm-up never waits for memory,
#: since its requests come one at a time.
_HANG_LINES: Final = 1000
_HANG_SECONDS: Final = 2.0
#: Seconds within which the PyTorch engine prints the reason after the line that its loop ended.
_WORDS_SECONDS: Final = 2.0
#: Events of LMDeploy's PyTorch engine alone; its own figures are INFO, which would print prompts.
_OF_PYTORCH: Final = (
    LoadingWeights, WarmingUp, LoopFailed, NoCache, LostLock, CacheFrame, VisionFrame,
)  # fmt: skip
#: Torch's exception itself, raised in Python or through C++.
_RAISED: Final = re.compile(r"(?:torch\.(?:cuda\.)?)?OutOfMemoryError: |\s*what\(\): ")


#: What may end an engine by itself.
Fault = CudaError | CheckFailed | NcclError | TorchMemory


class StartupTracker:
    """Follows one engine's log, which is kept in a file; call ``see`` with each run of lines."""

    def __init__(self, plan: Plan, log: Path, began: float = 0.0) -> None:
        self.plan, self.log = plan, log
        #: Its phases so far, and the time when each began.
        self.phases: list[tuple[Stage, float]] = [("starting", began)]
        self.budget: CacheBudget | None = None
        #: The engine's figures so far, with the plan's for comparison.
        self.figures: list[RunFigure] = []
        self.warming: int | None = None
        #: Why LMDeploy runs its PyTorch engine instead of TurboMind; empty if it does not.
        self.fallback = ""
        self._waits = 0
        self._waiting_since: float | None = None
        self._begin_evidence()

    def see(self, text: str, count: int, now: float) -> list[str]:
        """Process a line that came ``count`` times in a row; returns lines for people."""
        event = read_line(text)
        if event is None or (isinstance(event, _OF_PYTORCH) and not self.plan.engine.is_pytorch):
            return []
        if isinstance(event, TorchMemory) and not _RAISED.match(text):
            return []  # another message quotes the words
        if isinstance(event, Backpressure):
            if self.phase == "warm-up" and event.cause == "memory":
                self._waits += count
                self._waiting_since = now if self._waiting_since is None else self._waiting_since
            return []
        self._waits, self._waiting_since = 0, None
        if self._is_evidence(event, now):
            self._evidence_at = now
            return []
        return self._progress(event, now)

    @property
    def phase(self) -> Stage:
        return self.phases[-1][0]

    def enter(self, phase: Stage, now: float) -> list[str]:
        """Enter a phase once: with several ranks, the first line that shows it counts."""
        if self.phase == phase:
            return []
        self.phases.append((phase, now))
        return [f"phase: {phase}"]

    def survived(self, until: float) -> None:
        """Forget evidence from before ``until``, a time at which the engine answered a request."""
        if self._evidence_at < until:
            self._begin_evidence()

    def hangs(self, now: float) -> bool:
        """Whether the warm-up waits for room in the cache that can never become free."""
        since = self._waiting_since
        return since is not None and self._waits >= _HANG_LINES and now - since >= _HANG_SECONDS

    def loop_failed(self, now: float) -> bool:
        """Whether the PyTorch engine's loop has ended, and its reason was read or is overdue."""
        if self._loop_failed is None:
            return False
        return self.fault is not None or now - self._loop_failed >= _WORDS_SECONDS

    @property
    def failing(self) -> bool:
        """Whether the loop has ended and the reason may still be printed."""
        return self._loop_failed is not None

    @property
    def server_fault(self) -> NoCache | LostLock | None:
        """What ends the PyTorch engine's server without a fault; None if nothing did."""
        if self.no_cache:
            return NoCache(what=self.no_cache)
        return LostLock() if self.raced else None

    @property
    def cache_is_larger(self) -> bool:
        """Whether the cache may exceed the plan; the PyTorch engine does not report its size."""
        if self.budget is None:
            return self.plan.engine.is_pytorch
        return self.budget.budget - self.plan.kv.region_bytes > MIB

    def cached_tokens(self) -> int | None:
        """Tokens that the cache holds, by the engine's own figures; None if it gave none."""
        return next((figure.actual for figure in self.figures if figure.unit == "tokens"), None)

    def _begin_evidence(self) -> None:
        self.fault: Fault | None = None
        self.error: PythonError | None = None
        self.frames: list[str] = []
        self.no_cache = ""
        self.raced = False
        self.in_vision = False
        self._evidence_at = float("-inf")
        self._loop_failed: float | None = None

    def _is_evidence(self, event: Struct, now: float) -> bool:
        """Whether an event may explain the engine's end; keeps the first fault and last error."""
        match event:
            case CudaError() | CheckFailed() | NcclError() | TorchMemory():
                self.fault = self.fault or event
            case PythonError():
                self.error = event
                if event.out_of_memory:
                    self.fault = self.fault or TorchMemory(message=event.message)
            case Frame():
                self.frames.append(event.name)
            case VisionFrame():
                self.in_vision = self.in_vision or self.fault is None
            case NoCache():
                self.no_cache = event.what
            case LostLock():
                self.raced = self.phase == "starting"
            case LoopFailed():
                self._loop_failed = now if self._loop_failed is None else self._loop_failed
            case _:
                return False
        return True

    def _progress(self, event: Struct, now: float) -> list[str]:
        """Lines for people on an event that is no evidence; enters the event's stage."""
        match event:
            case EngineFallback():
                self.fallback = event.message
            case ImagesPrepared():
                return [f"images: {event.how}"]
            case WarmupLength():
                self.warming = event.tokens
        if isinstance(event, CacheFrame):
            # The PyTorch engine prints no line when it allocates its cache; a traceback shows it.
            if self.phase == "weights":
                self.enter("cache", now)
            return []
        stage = begins(self.phase, event)
        said = [] if stage is None else self.enter(stage, now)
        return [*said, *self._figures(event)]

    def _figures(self, event: Struct) -> list[str]:
        """Lines that compare the engine's figures with the plan's, at each kind's first event."""
        match event:
            case CacheBudget() if self.budget is None:
                self.budget = event
                found = list(cache_beside(self.plan, event))
            case Slab() if self.budget is not None and self.cached_tokens() is None:
                found = [tokens_beside(self.plan, self.budget, event)]
            case _:
                return []
        self.figures += found
        return list(map(in_words, found))


#: Phases of the pretend account; all others are serving.
_PRETEND: Final[dict[str, Phase]] = {
    "import": "start", "context": "start", "weights": "weights", "prepare": "weights",
    "engine": "cache", "cache": "cache", "buffers": "cache", "warm-up": "warm-up",
}  # fmt: skip


class EndedError(Exception):
    """An engine ended, and restarting it would not help."""

    def __init__(self, end: End) -> None:
        super().__init__(end.message)
        self.end = end


def end_of(
    code: int | None,
    tracker: StartupTracker,
    *,
    host_kills: int | None = None,
) -> End:
    """The end of an engine that was not ended by turbofit.

    ``code`` is negative for a signal, or 128 + the signal; with None the PyTorch engine's loop has
    ended, while the server in front of it lives and would answer 503 for ever. ``host_kills``: how
    many processes the kernel killed for memory meanwhile; None if that cannot be read.
    """
    # Its server alone ends for want of a cache, or of the engine; one whose loop ended lives.
    fatal = tracker.fault or (None if code is None else tracker.server_fault)
    told = told_kind(fatal, engine_of(tracker.plan).log.pinned_call)
    kind = end_kind(code, told, host_kills=host_kills)
    if kind == told and told in ("out_of_memory", "host_memory"):
        return ran_out(tracker)
    if kind in ("killed", "host_memory"):
        return _killed(tracker, host_kills)
    see = f"its log is {tracker.log}; turbofit doctor reads the kernel's log for errors of a card"
    if kind == "raced":
        # The server closes the lock under which the engine has told its port, sometimes before the
        # engine has let go of it. lmdeploy zmq_engine.py::ZMQMPEngine._start_mp_proc #bf32c0
        message = "LMDeploy's server and its engine lost each other while they started (EOFError)"
        return End(kind=kind, message=message, hint=see)
    words = _last_words(tracker)
    if code is None:
        message = f"the engine's loop ended {_where(tracker)}{words}"
        message += "; its server would answer 503 for ever"
    else:
        message = f"the engine ended {_where(tracker)} with {exit_words(code)}{words}"
    if kind == "unknown":
        message += "; its log tells of a lack of memory, of which no process ends like that"
    return End(kind=kind, message=message, hint=see, where=_frame(tracker))


def hang(tracker: StartupTracker) -> End:
    """The end of a warm-up that waits for ever: the cache cannot hold one of its requests."""
    cached = tracker.cached_tokens()
    holds = f"{cached:,} tokens" if cached is not None else "too few tokens"
    plan = tracker.plan
    tokens = tracker.warming or engine_of(plan).forward_tokens(plan.settings)
    return End(
        kind="hang",
        phase="warm-up",
        message=f"LMDeploy hangs in its warm-up: its cache holds {holds}, a request of {tokens:,}"
        " waits for room in it, and it would wait for ever without an error",
        hint="free GPU memory, raise --cache-max-entry-count or lower --max-prefill-token-num; "
        f"the log is {tracker.log}",
    )


def stalled(what: str, log: Path) -> End:
    return End(kind="stalled", message=what, hint=f"its log is {log}")


def silence_words(plan: Plan, phase: str, seconds: float) -> str:
    """A message on why a starting engine may print nothing for ``seconds``."""
    text = f"silent for {seconds:.0f} s in phase {phase}"
    text += "; weights may come from a slow disk" if phase == "weights" else ""
    if plan.settings.tp > 1 and plan.engine.is_pytorch:
        return f"{text}; Ray waits like this, up to half an hour, for GPUs that somebody has"
    if plan.settings.tp > 1 and plan.settings.communicator == "nccl":
        return (
            f"{text}; NCCL waits like this where GPUs do not reach each other as the driver says "
            "(IOMMU, ACS): where no more memory is taken, try NCCL_P2P_DISABLE=1, and see turbofit"
            " doctor"
        )
    return text


def fallback(tracker: StartupTracker) -> End:
    """The end of a start in which LMDeploy chose another engine than the plan's."""
    return End(
        kind="refused",
        message="LMDeploy would run its PyTorch engine, which the plan is not for: "
        f"{tracker.fallback}",
        hint="TurboMind needs NVIDIA's driver and LMDeploy's own CUDA libraries; "
        f"the log is {tracker.log}",
    )


def ran_out(tracker: StartupTracker, death: End | None = None) -> End:
    """The end by a lack of memory; ``death``, the refusal of a pretend GPU, adds its bytes."""
    fault, pytorch = tracker.fault, tracker.plan.engine.is_pytorch
    if fault is None:
        return _without_cache(tracker)
    if told_kind(fault, engine_of(tracker.plan).log.pinned_call) == "host_memory":
        return _page_locked(tracker, fault)
    torch = fault if isinstance(fault, TorchMemory) else None
    if torch is not None and not pytorch:
        death = None  # the account is TurboMind's, and torch's memory is not in it
    refused = death or End()
    asked = torch.requested if torch is not None and death is None else refused.asked
    return End(
        kind="out_of_memory",
        phase=_phase(tracker, torch, refused),
        where=refused.where or ("" if torch else _frame(tracker)),
        asked=asked,
        left=refused.left,
        missing=_missing(torch if pytorch else None, death),
        gpu=refused.gpu,
        message=_shortage(tracker, refused, asked),
        hint=_advice(tracker),
    )


def _without_cache(tracker: StartupTracker) -> End:
    text = f"the engine found no memory for its {tracker.no_cache} when it had loaded the weights"
    return End(kind="out_of_memory", phase="cache", message=text, hint=_advice(tracker))


def _page_locked(tracker: StartupTracker, fault: Fault) -> End:
    return End(
        kind="host_memory",
        phase="host",
        where=_frame(tracker),
        message=f"the engine got no page-locked host memory {_where(tracker)}: {last_words(fault)}",
        hint=f"free host memory; the plan counts {format_bytes(tracker.plan.host.pinned)} pinned; "
        f"the log is {tracker.log}",
    )


def _phase(tracker: StartupTracker, torch: TorchMemory | None, refused: End) -> Phase:
    """The phase, from the pretend account if that refused an allocation, else from the log."""
    pytorch = tracker.plan.engine.is_pytorch
    if _staged(tracker.plan, torch):
        return "weights"
    if refused.asked is not None and refused.left is not None and not pytorch:
        return _PRETEND.get(refused.phase, "vision" if is_vision(refused.where) else "text")
    if tracker.phase == "starting":
        return "weights" if pytorch else "start"
    return phase_of_death(tracker.phase, tracker.frames, images=tracker.in_vision)


def _staged(plan: Plan, torch: TorchMemory | None) -> bool:
    """Whether torch ran out of memory in TurboMind's process, which uses torch to load weights."""
    return torch is not None and plan.engine.of_lmdeploy and not plan.engine.is_pytorch


def _shortage(tracker: StartupTracker, refused: End, asked: int | None) -> str:
    """Words on which engine ran out and where, with the asked and the left bytes if known."""
    fault, who = tracker.fault, "the engine"
    if not tracker.plan.engine.of_lmdeploy:
        who = "the fallback engine"
    short = out_of_memory(who, tracker.phase, refused.where or _frame(tracker))
    if refused.asked is not None and refused.left is not None:
        doing = ", and the pretend GPU refused (simulated)" if refused.simulated else ""
        return (
            f"{short}: it asked {format_bytes(refused.asked)} where {format_bytes(refused.left)} "
            f"were left on GPU {refused.gpu}{doing}"
        )
    if isinstance(fault, CudaError):
        return f"{short}: {last_words(fault)}"
    told = f"{short}, asking {format_bytes(asked)}" if asked else short
    torch = fault if isinstance(fault, TorchMemory) else None
    staged = _staged(tracker.plan, torch)
    return f"{told}: torch stages the weights on the first GPU" if staged else told


def _killed(tracker: StartupTracker, host_kills: int | None) -> End:
    """The end by SIGKILL: the kernel's if it counts a kill or no count is known, else another's."""
    log = f"the log is {tracker.log}"
    if host_kills == 0:
        return End(
            kind="killed",
            message=f"the engine was killed {_where(tracker)} by SIGKILL; the kernel counts no such"
            " kill for want of memory, so somebody did it",
            hint=log,
        )
    host = tracker.plan.host
    pinned, pageable = format_bytes(host.pinned), format_bytes(host.pageable)
    return End(
        kind="host_memory",
        phase="host",
        message=f"the engine was killed {_where(tracker)}: the kernel does so when host memory runs"
        " out",
        hint=f"free host memory; the plan counts {pageable} pageable and {pinned} pinned; {log}",
    )


def _missing(torch: TorchMemory | None, death: End | None) -> int | None:
    """The bytes that torch reports as missing; a pretend account sees only the refused piece."""
    refused = None if death is None else death.missing
    if torch is None or (death is not None and death.simulated):
        return refused
    return max((size for size in (refused, torch.missing) if size is not None), default=None)


def _frame(tracker: StartupTracker) -> str:
    return next((name for name in tracker.frames if not name.startswith("TM_")), "")


def _where(tracker: StartupTracker) -> str:
    return when(tracker.phase, _frame(tracker))


def _advice(tracker: StartupTracker) -> str:
    if tracker.phase in ("starting", "weights"):
        if not tracker.plan.engine.of_lmdeploy:
            return f"split it over more GPUs (--tp) or free them; the log is {tracker.log}"
        return f"more --tp, an AWQ variant or freer GPUs; the log is {tracker.log}"
    margin = max(gpu.margin for gpu in tracker.plan.gpus)
    return (
        "somebody else may have taken memory, or the plan counted too little: plan with a --margin "
        f"above {format_bytes(margin)}; the log is {tracker.log}"
    )


def _last_words(tracker: StartupTracker) -> str:
    words = last_words(tracker.fault or tracker.error)
    return f": {words}" if words else ""
