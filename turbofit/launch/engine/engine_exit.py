"""Why an engine ended, as one type: from its exit code, its phase and the end of its log.

On pretend GPUs the account's timeline adds which GPU, which call, and how many bytes were missing.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final, Literal

from turbofit.core.errors import (
    DoesNotFitError,
    LaunchError,
    OutOfMemoryError,
    TurbofitError,
)
from turbofit.core.units import format_bytes
from turbofit.observe.turbomind_log import CheckFailed, CudaError, NcclError, TorchOutOfMemory

if TYPE_CHECKING:
    from pathlib import Path

    from turbofit.core.json_types import Document
    from turbofit.core.plan import Plan
    from turbofit.launch.engine.pretend_usage import PretendDeath
    from turbofit.launch.engine.startup_tracker import StartupTracker

__all__ = [
    "EndedError", "EngineExit", "MemoryPhase", "advice", "ending", "fallback", "hang", "silence",
    "stalled", "where",
]  # fmt: skip

Kind = Literal[
    "out_of_memory", "host_memory", "hang", "killed", "raced", "crash", "stalled", "refused"
]

#: What the memory was for when there was none left.
MemoryPhase = Literal["start", "weights", "cache", "warm-up", "vision", "text", "host"]

#: Characters of somebody else's message: some list everything that they know.
_SHOWN: Final = 300
_VISION: Final = ("Vit", "vit", "Vision", "vision")
#: Phases of the pretend account, as `MemoryPhase`; what is not here is serving.
_PRETEND: Final[dict[str, MemoryPhase]] = {
    "import": "start", "context": "start", "weights": "weights", "prepare": "weights",
    "engine": "cache", "cache": "cache", "buffers": "cache", "warm-up": "warm-up",
}  # fmt: skip


class EngineExit:
    """How one engine ended.

    Args:
        kind: what happened.
        error: the same for people.
        phase: for a lack of memory, what it was for.
        where: the engine's call, as far as it is known.
        gpu: the machine's index of the GPU, as far as it is known.
        missing: bytes that were missing, as far as they are known.
        requested: bytes that were asked for, likewise.
        left: bytes that were left, likewise.
    """

    def __init__(  # noqa: PLR0913 - a constructor
        self,
        kind: Kind,
        error: TurbofitError,
        *,
        phase: MemoryPhase | None = None,
        where: str = "",
        gpu: int | None = None,
        missing: int | None = None,
        requested: int | None = None,
        left: int | None = None,
    ) -> None:
        self.kind, self.error, self.phase, self.where = kind, error, phase, where
        self.gpu, self.missing, self.requested, self.left = gpu, missing, requested, left
        #: Which of the plan's groups it was, where that is known.
        self.group: int | None = None

    @property
    def retryable(self) -> bool:
        """Whether starting the same again may well work."""
        return self.kind in ("killed", "raced", "crash", "stalled")

    @property
    def is_oom(self) -> bool:
        """Whether other settings may help."""
        return self.kind in ("out_of_memory", "host_memory", "hang")

    def record(self) -> Document:
        """For the run's record."""
        facts = {
            "kind": self.kind, "phase": self.phase, "where": self.where, "gpu": self.gpu,
            "asked": self.requested, "left": self.left, "missing": self.missing,
            "message": self.error.message,
        }  # fmt: skip
        return {name: value for name, value in facts.items() if value not in (None, "")}


class EndedError(Exception):
    """An engine ended, and the supervisor cannot mend it by starting it again."""

    def __init__(self, ending: EngineExit) -> None:
        super().__init__(ending.error.message)
        self.ending = ending


def ending(  # noqa: PLR0913 - what is known of an ending
    code: int,
    tracker: StartupTracker,
    plan: Plan,
    log: Path,
    *,
    death: PretendDeath | None = None,
    host_kills: int | None = None,
    notes: tuple[str, ...] = (),
) -> EngineExit:
    """The ending of an engine that ended by itself.

    Args:
        code: its exit code; negative for a signal, or 128 + the signal.
        tracker: what its log said.
        plan: what it was started with.
        log: where its log is.
        death: on pretend GPUs, the refused allocation.
        host_kills: processes that the kernel killed for memory while it ran; None: not readable.
        notes: what the kernel's log says about it.
    """
    number = -code if code < 0 else code - 128 if code > 128 else 0
    fault = tracker.fault
    if isinstance(fault, TorchOutOfMemory):
        return _torch(fault, tracker, plan, log)
    if isinstance(fault, CudaError) and fault.out_of_memory:
        return _cuda(fault, tracker, plan, log, death)
    if number == signal.SIGKILL:
        return _killed(tracker, plan, log, host_kills)
    more = "".join(f"; {note}" for note in notes)
    error = LaunchError(
        f"the engine ended {where(tracker)} with {_code(code, number)}{_last_words(tracker)}{more}",
        hint=f"its log is {log}",
    )
    return EngineExit("crash", error, where=_frame(tracker))


def hang(tracker: StartupTracker, plan: Plan, log: Path) -> EngineExit:
    """A warm-up that waits for ever: the cache cannot hold one of its requests."""
    cached = tracker.cached_tokens()
    holds = f"{cached:,} tokens" if cached is not None else "too few tokens"
    tokens = tracker.warming or plan.settings.max_prefill_token_num + plan.settings.max_batch_size
    error = DoesNotFitError(
        f"LMDeploy hangs in its warm-up: its cache holds {holds}, a request of {tokens:,} waits "
        "for room in it, and it would wait for ever without an error",
        hint="free GPU memory, raise --cache-max-entry-count or lower --max-prefill-token-num; "
        f"the log is {log}",
    )
    return EngineExit("hang", error, phase="warm-up")


def stalled(what: str, log: Path) -> EngineExit:
    """An engine that lives and does nothing."""
    return EngineExit("stalled", LaunchError(what, hint=f"its log is {log}"))


def silence(plan: Plan, phase: str, seconds: float) -> str:
    """What it may mean that a starting engine prints nothing for so long."""
    said = f"silent for {seconds:.0f} s in phase {phase}"
    said += "; weights may come from a slow disk" if phase == "weights" else ""
    if plan.settings.tp > 1 and plan.engine.is_pytorch:
        return f"{said}; Ray waits like this, up to half an hour, for GPUs that somebody has"
    if plan.settings.tp > 1 and plan.settings.communicator == "nccl":
        return (
            f"{said}; NCCL waits like this where GPUs do not reach each other as the driver says "
            "(IOMMU, ACS): where no more memory is taken, try NCCL_P2P_DISABLE=1, and see turbofit"
            " doctor"
        )
    return said


def fallback(tracker: StartupTracker, log: Path) -> EngineExit:
    """LMDeploy chose another engine than the one planned for."""
    said = tracker.fallback.message if tracker.fallback is not None else "it fell back to PyTorch"
    error = LaunchError(
        f"LMDeploy would run its PyTorch engine, which the plan is not for: {said}",
        hint=f"TurboMind needs NVIDIA's driver and LMDeploy's own CUDA libraries; the log is {log}",
    )
    return EngineExit("refused", error)


def _torch(fault: TorchOutOfMemory, tracker: StartupTracker, plan: Plan, log: Path) -> EngineExit:
    allocation = f", asking {format_bytes(fault.requested)}" if fault.requested else ""
    if not plan.engine.of_lmdeploy:
        short = OutOfMemoryError(
            f"the fallback engine ran out of GPU memory {where(tracker)}{allocation}",
            hint=advice(tracker, plan, log),
        )
        return EngineExit(
            "out_of_memory", short, phase=_memory_phase(tracker), requested=fault.requested
        )
    error = OutOfMemoryError(
        f"the engine ran out of GPU memory {where(tracker)}{allocation}: torch stages the weights "
        "on the first GPU",
        hint=advice(tracker, plan, log),
    )
    return EngineExit("out_of_memory", error, phase="weights", requested=fault.requested)


def _cuda(
    fault: CudaError, tracker: StartupTracker, plan: Plan, log: Path, death: PretendDeath | None
) -> EngineExit:
    if fault.pinned and plan.engine.version.startswith("0.18"):
        pinned = format_bytes(plan.host.pinned)
        lack = OutOfMemoryError(
            f"the engine got no page-locked host memory {where(tracker)}: CUDA error: "
            f"{fault.message}",
            hint=f"free host memory; the plan counts {pinned} pinned; the log is {log}",
        )
        return EngineExit("host_memory", lack, phase="host", where=_frame(tracker))
    phase = _memory_phase(tracker)
    if death is None:
        error = OutOfMemoryError(
            f"the engine ran out of GPU memory {where(tracker)}: CUDA error: {fault.message}",
            hint=advice(tracker, plan, log),
        )
        return EngineExit("out_of_memory", error, phase=phase, where=_frame(tracker))
    serving: MemoryPhase = "vision" if _is_vision(death.where) else "text"
    error = OutOfMemoryError(
        f"the engine ran out of GPU memory {where(tracker, death.where)}: it asked "
        f"{format_bytes(death.requested)} where {format_bytes(death.left)} were left on"
        f" GPU {death.gpu}"
        f"{', and the pretend GPU refused (simulated)' if death.simulated else ''}",
        hint=advice(tracker, plan, log),
    )
    return EngineExit(
        "out_of_memory",
        error,
        phase=_PRETEND.get(death.phase, serving),
        where=death.where,
        gpu=death.gpu,
        missing=death.short,
        requested=death.requested,
        left=death.left,
    )


def _killed(tracker: StartupTracker, plan: Plan, log: Path, host_kills: int | None) -> EngineExit:
    """SIGKILL: the kernel's where it counted one, or its count is not readable; else somebody's."""
    if host_kills == 0:
        error = LaunchError(
            f"the engine was killed {where(tracker)} by SIGKILL; the kernel counts no such kill "
            "for want of memory, so somebody did it",
            hint=f"its log is {log}",
        )
        return EngineExit("killed", error)
    pinned, pageable = format_bytes(plan.host.pinned), format_bytes(plan.host.pageable)
    oom = OutOfMemoryError(
        f"the engine was killed {where(tracker)}: the kernel does so when host memory runs out",
        hint=f"free host memory; the plan counts {pageable} pageable and {pinned} pinned; "
        f"the log is {log}",
    )
    return EngineExit("host_memory", oom, phase="host")


def _memory_phase(tracker: StartupTracker) -> MemoryPhase:
    if tracker.phase == "starting":
        return "start"
    if tracker.phase in ("weights", "cache", "warm-up"):
        return tracker.phase
    return "vision" if any(_is_vision(name) for name in tracker.frames) else "text"


def _is_vision(name: str) -> bool:
    return any(word in name for word in _VISION)


def _frame(tracker: StartupTracker) -> str:
    return next((name for name in tracker.frames if not name.startswith("TM_")), "")


def where(tracker: StartupTracker, call: str = "") -> str:
    """In which phase an engine was, and in which call, in words."""
    phase = {
        "starting": "while it started",
        "weights": "while it loaded weights",
        "cache": "when it allocated the cache",
        "warm-up": "in its warm-up",
        "serving": "while it served",
        "check": "at a worst-case request",
        "ready": "while it served",
    }[tracker.phase]
    name = call or _frame(tracker)
    return f"{phase} (in {name})" if name else phase


def advice(tracker: StartupTracker, plan: Plan, log: Path) -> str:
    """What to change for an out-of-memory of this phase."""
    if tracker.phase in ("starting", "weights"):
        if not plan.engine.of_lmdeploy:
            return f"split it over more GPUs (--tp) or free them; the log is {log}"
        return f"more --tp, an AWQ variant or freer GPUs; the log is {log}"
    margin = max(gpu.margin for gpu in plan.gpus)
    return (
        "somebody else may have taken memory, or the plan counted too little: plan with a --margin "
        f"above {format_bytes(margin)}; the log is {log}"
    )


def _code(code: int, number: int) -> str:
    if number:
        try:
            return f"signal {signal.Signals(number).name}"
        except ValueError:
            return f"signal {number}"
    return f"exit code {code}"


def _last_words(tracker: StartupTracker) -> str:
    fault = tracker.fault
    if isinstance(fault, CudaError):
        return f": CUDA {'driver ' if fault.driver else ''}error: {fault.message}"
    if isinstance(fault, CheckFailed):
        return f": check failed: {fault.message}"
    if isinstance(fault, NcclError):
        return f": {fault.message}"
    if tracker.error is not None:
        return f": {tracker.error.name}: {tracker.error.message[:_SHOWN]}"
    return ""
