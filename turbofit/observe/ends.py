"""Which kind of end a process had: its exit code, the kernel's counts and its log must agree."""

from __future__ import annotations

import signal
from typing import Literal

from turbofit.core.rehearsal import EndKind

#: What the memory was for when there was none left.
MemoryPhase = Literal["start", "weights", "cache", "warm-up", "vision", "text", "host"]


def end_kind(code: int | None, *, out_of_memory: bool, host_kills: int | None = None) -> EndKind:
    """The kind of an end, by all that tells of it.

    Args:
        code: the exit code; negative for a signal, or 128 + the signal. None: the process lives,
            its engine's loop has ended by its own record, and it answers no request.
        out_of_memory: whether the log's fatal event is a lack of memory.
        host_kills: processes that the kernel killed for memory meanwhile; None: not readable.

    Returns:
        ``unknown`` where they disagree: an engine that memory ends aborts or exits with an error.
    """
    number = _signal(code)
    if out_of_memory:
        agrees = code is None or number == signal.SIGABRT or (code != 0 and not number)
        return "out_of_memory" if agrees else "unknown"
    if number == signal.SIGKILL:
        return "killed" if host_kills == 0 else "host_memory"
    return "crash"


def exit_words(code: int | None) -> str:
    """A process's end in words."""
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
