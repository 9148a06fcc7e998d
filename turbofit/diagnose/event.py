"""The event that a log tells of, found first: causes are asked of it alone, all else are facts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Literal

from turbofit.core.struct import Struct
from turbofit.diagnose.facts import LogEvent
from turbofit.diagnose.rules.causes import matches
from turbofit.observe.log_events import FATAL, KnownMessage, PythonError, ServerUp, WarmupFinished

if TYPE_CHECKING:
    from turbofit.diagnose.facts import LogFacts
    from turbofit.diagnose.rules.causes import Cause

#: How an end is written: an exception's name, a logger's level, a signal, an exit.
_END: Final = re.compile(
    r"[A-Z]\w*(?:Error|Exception|Exit|Interrupt)\b|\b(?:[Ee]rror|ERROR|FATAL|[Ff]atal|CRITICAL)\b"
    r"|\b(?:[Ff]ailed|Aborted|Killed|OOMKilled|Exited|SIG[A-Z]+|[Tt]imeout|timed out|Xid|dumped)\b"
    r"|status=|[Ee]xit ?[Cc]ode|\[TM\]|NCCL WARN"
)
#: The last line of a traceback.
_RAISED: Final = re.compile(r"(?:\w+\.){0,9}[A-Z]\w*(?:Error|Exception|Exit|Interrupt)(?:: |$)")
#: What a program goes on after, by the level that it prints.
_WARNED: Final = re.compile(
    r"\W*(?:INFO|DEBUG|WARN(?:ING)?)\b|.{0,240}?(?:\bWARNING\b|[a-z]Warning: "
    r"|\b[Ff]all(?:s|ing)?[ -]?back|\b[Rr]etrying\b)"
)
#: What Python's warnings module prints, whatever it quotes.
_PYTHON_WARNING: Final = re.compile(r"\S*\.py:\d+: \w*Warning: ")
#: Kinds of the machine: a warning about it is an answer by itself, whichever program printed it.
_MACHINE: Final = (
    "no_gpu", "driver_too_old", "driver_mismatch", "gpu_too_new", "gpu_too_old", "no_kernel_image",
    "container_without_gpu", "gpu_lost", "shared_memory", "disk_full", "hang", "ray_waits",
)  # fmt: skip
#: Words of faults after which a process has no CUDA context, or no communicator: none is outlived.
_NEVER_OUTLIVED: Final = ("CUDA error", "CUDA runtime error", "[TM][FATAL]", "NCCL")


class Event(Struct):
    """What happened.

    ``outcome``: ``fatal`` (an exception, abort, signal or kill ended the run), ``complaint`` (the
    program itself says that it refuses, cuts or waits), ``nothing``. ``marks`` tell of it, in the
    log's order: workers print their error before their parent does. ``last`` is the last exception
    that no row knows.
    """

    outcome: Literal["fatal", "complaint", "nothing"]
    marks: tuple[LogEvent, ...] = ()
    last: LogEvent | None = None


def _row(mark: LogEvent) -> Cause | None:
    return next((row for row, _ in matches(mark.text)), None)


def _of_machine(row: Cause | None) -> bool:
    return row is not None and row.kind in _MACHINE


def event_of(facts: LogFacts) -> Event:
    """The event of a run.

    What an engine outlived is none, and no line that has only the words of a message, without the
    form of an end, once another exception ended the run.
    """
    ready = max(
        (mark.line for kind in (ServerUp, WarmupFinished) for mark, _ in facts.every(kind)),
        default=0,
    )
    last = next((mark for mark, _ in reversed(facts.every(PythonError))), None)
    raised = max((mark.line for mark in facts.marks if _RAISED.match(mark.text)), default=0)
    fatal: list[LogEvent] = []
    complaints: list[LogEvent] = []
    warned: list[LogEvent] = []
    for mark in facts.marks:
        known = isinstance(mark.event, KnownMessage)
        if not known and not isinstance(mark.event, FATAL):
            continue
        if known:
            row = _row(mark)
            if row is not None and row.rank == "notice":
                complaints.append(mark)
                continue
            passed = (last is not None and mark.line < last.line) or (
                mark.line < raised and not _of_machine(row)
            )
            if passed and not _END.search(mark.text):
                continue
        if mark.line < ready or (
            mark.line < facts.outlived_before
            and (known or isinstance(mark.event, PythonError))
            and not any(word in mark.text for word in _NEVER_OUTLIVED)
        ):
            continue
        warns = (_WARNED if known else _PYTHON_WARNING).match(mark.text)
        (warned if warns else fatal).append(mark)
    # Torch warns of the driver and says later that it has no GPU: the warning says why. Alone, a
    # warning is the event where it tells of the machine; what else is warned of is outlived.
    if all((row := _row(mark)) is not None and row.kind == "no_gpu" for mark in fatal):
        fatal += [mark for mark in warned if fatal or _of_machine(_row(mark))]
    if fatal:
        marks = sorted((*fatal, *complaints), key=lambda mark: mark.line)
        return Event(outcome="fatal", marks=tuple(marks), last=last)
    return Event(outcome="complaint" if complaints else "nothing", marks=tuple(complaints))
