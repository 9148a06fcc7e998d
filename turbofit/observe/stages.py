"""The stages that an engine passes, and the phase in which it died: one table and its words.

`serve` follows a living engine with it, and `diagnose` reads an engine's log with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from turbofit.observe import log_events as events

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.struct import Struct

#: ``starting`` is before any engine exists; ``check`` and ``ready`` are a server's own stages.
Stage = Literal["starting", "weights", "cache", "warm-up", "serving", "check", "ready", "dying"]
#: What an engine was doing when it died, or what it needed the memory for.
Phase = Literal[
    "starting", "start", "weights", "cache", "warm-up", "vision", "text", "quantising", "serving",
    "check", "ready", "host", "host RAM", "start-up hang", "configuration", "peer access",
    "communication", "none", "unknown",
]  # fmt: skip

#: The transitions: the stage that each event begins. A later rank prints an event again; an event
#: of an earlier stage changes nothing. After ``dying`` only a new start changes the stage.
BEGINS: Final[dict[type[Struct], Stage]] = {
    events.Starting: "weights",
    events.LoadingWeights: "weights",
    events.CacheBudget: "cache",
    events.Slab: "cache",
    events.KvBlocks: "cache",
    events.WarmingUp: "warm-up",
    events.WarmupLengths: "warm-up",
    events.WarmupFinished: "serving",
    events.ServerUp: "serving",
    events.CudaError: "dying",
    events.LegacyCuda: "dying",
    events.CheckFailed: "dying",
}
_ORDER: Final = ("starting", "weights", "cache", "warm-up", "serving", "dying")
_WHEN: Final[dict[str, str]] = {
    "starting": "while it started",
    "start": "while it started",
    "weights": "while it loaded weights",
    "cache": "when it allocated the cache",
    "warm-up": "in its warm-up",
    "vision": "when it encoded images",
    "text": "in a forward of the language model",
    "quantising": "while it quantised",
    "serving": "while it served",
    "check": "at a worst-case request",
    "ready": "while it served",
    "unknown": "(the log does not say where)",
}
_VISION: Final = ("Vit", "vit", "Vision", "vision", "visual")


def begins(stage: Stage, event: Struct) -> Stage | None:
    """The stage that an event begins; None if that is the current stage or an earlier one."""
    new = BEGINS.get(type(event))
    if new is None or stage not in _ORDER or _ORDER.index(new) <= _ORDER.index(stage):
        return None
    return new


class Course:
    """The stages of one run in a log, and the stage of the first fault."""

    def __init__(self) -> None:
        self.stage: Stage = "starting"
        #: The stage at the first fault; without a fault, the last stage.
        self.reached: Stage = "starting"
        self._died_at = ""

    def start(self) -> None:
        """Begin an engine: its command, or the progress bar of its loading, was read."""
        if self.stage == "starting":
            self.stage = self.reached = "weights"

    def take(self, event: Struct, time: str) -> None:
        """Follow an event; ``time`` is TurboMind's, whose fatal lines may precede older ones."""
        if self.stage == "dying":
            earlier = begins(self.reached, event) if time and time <= self._died_at else None
            self.reached = earlier if earlier not in (None, "dying") else self.reached
            return
        new = begins(self.stage, event)
        if new == "dying":
            self._died_at = time
        elif new is not None:
            self.reached = new
        self.stage = new or self.stage


def is_vision(name: str) -> bool:
    return any(word in name for word in _VISION)


def phase_of_death(stage: Stage, frames: Sequence[str], *, images: bool = False) -> Phase:
    """The phase in which an engine died: by its stack, else by the stage that it had reached.

    Args:
        stage: the stage at the fault.
        frames: the calls of the aborting thread, innermost first.
        images: whether a forward pass with images was running.
    """
    if stage in ("serving", "check", "ready"):
        seen = any(map(is_vision, frames)) or (images and not frames)
        return "vision" if seen else "text"
    if stage == "warm-up" and any(map(is_vision, frames)):
        return "vision"
    # The log may announce the first request while another thread still allocates its workspaces.
    if stage == "warm-up" and frames and all("InternalThreadEntry" in name for name in frames):
        return "cache"
    # LMDeploy's own log level hides the warm-up's line, but a forward pass is on the stack.
    if stage == "cache" and any("orward" in name for name in frames):
        return "warm-up"
    return "unknown" if stage == "dying" else stage


def when(phase: str, frame: str = "") -> str:
    """A phase or stage in words, with the name of the call that failed."""
    return _WHEN[phase] + (f" (in {frame})" if frame else "")


def out_of_memory(engine: str, phase: str, frame: str = "") -> str:
    """The sentence about an engine that ran out of GPU memory, for `serve` and `diagnose`."""
    return f"{engine} ran out of GPU memory {when(phase, frame)}"


def last_words(fault: Struct | None, most: int = 300) -> str:
    """A fault's own message; other programs' messages are cut, as some list many things."""
    match fault:
        case events.CudaError():
            return f"CUDA {'driver ' if fault.driver else ''}error: {fault.message}"
        case events.LegacyCuda():
            return f"CUDA runtime error: {fault.message}"
        case events.CheckFailed():
            return f"check failed: {fault.message}"
        case events.NcclError() | events.TorchMemory():
            return fault.message[:most]
        case events.PythonError():
            return f"{fault.name}: {fault.message[:most]}"
    return ""
