"""The kind of an engine's death: decided here for a launch, a rehearsal and `diagnose`.

It follows from the log's event, the exit code and the kernel's counts, which must agree. A probe or
a plan decides what no log contains: a stall, a refusal (`core.engine_end.EndKind`).
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

from turbofit.observe.log_events import (
    Backpressure,
    CudaError,
    HostKill,
    LegacyCuda,
    LostLock,
    NoCache,
    PythonError,
    TorchMemory,
)
from turbofit.observe.log_reader import read_line

if TYPE_CHECKING:
    from turbofit.core.engine_end import EndKind
    from turbofit.core.struct import Struct

#: What `turbofit.diagnosis/1` calls a kind, where it has another word. A crash is called by its
#: cause, a row of `presets/causes.yaml`; this is the word for one whose cause no line tells.
IN_DIAGNOSIS: Final[dict[EndKind, str]] = {
    "host_memory": "host_out_of_memory",
    "hang": "start_hang",
    "stalled": "stands_still",
    "crash": "crashed",
}


def diagnosed(kind: EndKind) -> str:
    """The word of a diagnosis for a kind."""
    return IN_DIAGNOSIS.get(kind, kind)


def told_kind(event: Struct | None, pinned_call: str = "") -> EndKind:
    """The kind that the event of a log tells by itself: ``crash`` if it names no other.

    ``pinned_call`` is the line of the engine's source that asks for page-locked host memory.
    """
    match event:
        case HostKill():
            return "host_memory"
        case Backpressure():  # the warm-up's, for ever
            return "hang"
        case LostLock():
            return "raced"
        case CudaError(out_of_memory=True, call=call) if call and call == pinned_call:
            return "host_memory"
        case (
            NoCache()
            | TorchMemory()
            | CudaError(out_of_memory=True)
            | LegacyCuda(out_of_memory=True)
            | PythonError(out_of_memory=True)
        ):
            return "out_of_memory"
    return "crash"


def told_event(message: str) -> Struct | None:
    """The event of the first line of a message that tells why the engine died, if any does."""
    events = map(read_line, message.splitlines())
    return next((event for event in events if told_kind(event) != "crash"), None)


def end_kind(code: int | None, told: EndKind, *, host_kills: int | None = None) -> EndKind:
    """Return the kind of a process's end, from its exit code, the kernel's counts and its log.

    Args:
        code: the exit code; negative for a signal, or 128 + the signal. None: the process lives,
            but its engine's loop has ended by its own record, and it answers no request.
        told: the kind by its log alone.
        host_kills: processes that the kernel killed for memory meanwhile; None: not readable.

    Returns:
        ``unknown`` if they disagree: an engine without memory aborts or exits with an error.
    """
    number = _signal(code)
    if told in ("out_of_memory", "host_memory"):
        agrees = code is None or number == signal.SIGABRT or (code != 0 and not number)
        return told if agrees else "unknown"
    if number == signal.SIGKILL:
        return "killed" if host_kills == 0 else "host_memory"
    return told


def rehearsed_kind(told: EndKind, *, refused: bool = False, waits: bool = False) -> EndKind:
    """The kind of a rehearsal's end.

    Args:
        told: the kind by its log alone. A log may end with a wait that was not what ended it.
        refused: whether a pretend card had no room for an allocation.
        waits: whether nothing happened any more, so that the rehearsal was stopped.
    """
    if waits:
        return "hang"
    if refused:
        return "out_of_memory"
    return "crash" if told == "hang" else told


def exit_words(code: int | None) -> str:
    if code is None:
        return "no exit: its server lives and answers no request"
    number = _signal(code)
    if not number:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(number).name}"
    except ValueError:
        return f"signal {number}"


def _signal(code: int | None) -> int:
    if code is None:
        return 0
    return -code if code < 0 else code - 128 if 128 < code <= 192 else 0  # 64 signals; 255 is -1
