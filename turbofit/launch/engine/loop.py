"""How the PyTorch engine ends: its loop dies, and the server in front of it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.errors import LaunchError, OutOfMemoryError
from turbofit.core.units import format_bytes
from turbofit.launch.engine.engine_exit import EngineExit, advice, where

if TYPE_CHECKING:
    from pathlib import Path

    from turbofit.core.plan import Plan
    from turbofit.launch.engine.engine_exit import MemoryPhase
    from turbofit.launch.engine.pretend_usage import PretendDeath
    from turbofit.launch.engine.startup_tracker import StartupTracker
    from turbofit.observe.turbomind_log import TorchOutOfMemory

__all__ = ["loop_ended", "no_cache", "raced", "torch_ran_out"]

#: Characters of somebody else's message.
_SHOWN: Final = 300


def loop_ended(
    tracker: StartupTracker, plan: Plan, log: Path, death: PretendDeath | None = None
) -> EngineExit:
    """An engine whose loop failed: its server would answer 503 to every request, for ever."""
    from turbofit.observe.turbomind_log import TorchOutOfMemory

    if isinstance(tracker.fault, TorchOutOfMemory):
        return torch_ran_out(tracker.fault, tracker, plan, log, death)
    said = ""
    if tracker.error is not None:
        said = f": {tracker.error.name}: {tracker.error.message[:_SHOWN]}"
    error = LaunchError(
        f"the engine's loop ended {where(tracker)}{said}; its server would answer 503 for ever",
        hint=f"its log is {log}",
    )
    return EngineExit("crash", error)


def torch_ran_out(
    fault: TorchOutOfMemory,
    tracker: StartupTracker,
    plan: Plan,
    log: Path,
    death: PretendDeath | None = None,
) -> EngineExit:
    """Torch's own out-of-memory, with what the pretend account adds where there is one."""
    requested, left = fault.requested, None
    call = ""
    if death is not None:
        requested, left, call = death.requested, death.left, death.where
    detail = f", asking {format_bytes(requested)}" if requested else ""
    if left is not None and death is not None:
        detail += f" where {format_bytes(left)} were left on GPU {death.gpu}"
    error = OutOfMemoryError(
        f"the engine ran out of GPU memory {where(tracker, call)}{detail}",
        hint=advice(tracker, plan, log),
    )
    return EngineExit(
        "out_of_memory",
        error,
        phase=_phase(tracker),
        where=call,
        gpu=None if death is None else death.gpu,
        missing=_missing(fault, death),
        requested=requested,
        left=left,
    )


def no_cache(tracker: StartupTracker, plan: Plan, log: Path) -> EngineExit:
    """The engine found too little free memory to size a cache."""
    what = tracker.no_cache or "kv cache"
    error = OutOfMemoryError(
        f"the engine found no memory for its {what} when it had loaded the weights",
        hint=advice(tracker, plan, log),
    )
    return EngineExit("out_of_memory", error, phase="cache")


def raced(log: Path) -> EngineExit:
    """LMDeploy's two processes missed each other at the start: the same start mostly works again.

    The server closes the lock under which the engine has told its port, sometimes before the
    engine has let go of it. Source: LMDeploy 0.18 mp_engine/zmq_engine.py, ``_start_mp_proc``.
    """
    error = LaunchError(
        "LMDeploy's server and its engine lost each other while they started (EOFError)",
        hint=f"its log is {log}",
    )
    return EngineExit("raced", error)


def _missing(fault: TorchOutOfMemory, death: PretendDeath | None) -> int | None:
    """What torch says was missing; a pretend account sees the piece that was refused alone."""
    seen = None if death is None else death.short
    if death is not None and death.simulated:
        return seen
    return max((one for one in (seen, fault.missing) if one is not None), default=None)


def _phase(tracker: StartupTracker) -> MemoryPhase:
    if tracker.phase in ("starting", "weights"):
        return "weights"
    if tracker.phase in ("cache", "warm-up"):
        return tracker.phase
    return "vision" if tracker.in_vision else "text"
