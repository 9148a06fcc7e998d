"""The types that say how an engine ended, and what a rehearsal of an engine found.

`logs.death` decides the kind of an end by the engine's log and exit code.
"""

from __future__ import annotations

import signal
from typing import Annotated, Literal

from turbofit.core.errors import DoesNotFitError, LaunchError, OutOfMemoryError, TurbofitError
from turbofit.core.struct import Document, Struct, doc, to_builtins

#: ``out_of_memory``: a GPU had no memory left. ``host_memory``: the host had no memory left, or the
#: kernel killed the engine to free memory. ``hang``: the engine waits for cache that never becomes
#: free. ``killed``: a signal came from outside. ``raced``: LMDeploy's server and its engine lost
#: each other at the start. ``crash``: any other exit. ``stalled``: the engine lives, and a probe
#: had no answer. ``refused``: the engine broke a promise of the plan, and is not started again.
#: ``unknown``: the evidence is missing or contradictory.
EndKind = Literal[
    "out_of_memory", "host_memory", "hang", "killed", "raced", "crash", "stalled", "refused",
    "unknown",
]  # fmt: skip


#: What the engine did when it ended. After a refused allocation: what the memory was for.
Phase = Literal[
    "starting", "start", "weights", "cache", "warm-up", "vision", "text", "quantising", "serving",
    "check", "ready", "host", "host RAM", "start-up hang", "configuration", "peer access",
    "communication", "none", "unknown",
]  # fmt: skip


class AnyEnd(Struct):
    """How an engine ended; in a rehearsal, ``phase`` may also name a worst case."""

    kind: EndKind = "unknown"
    phase: Annotated[
        str, doc("What the engine did, what the refused memory was for, or case NAME.")
    ] = ""
    where: Annotated[str, doc("The call that failed, or why the engine ended.")] = ""
    asked: Annotated[int | None, doc("Bytes of the allocation that was refused.")] = None
    left: Annotated[int | None, doc("Bytes that were free at this allocation.")] = None
    missing: Annotated[int | None, doc("Bytes by which the card would have to be larger.")] = None
    gpu: Annotated[int | None, doc("The machine's index of the GPU.")] = None
    group: Annotated[int | None, doc("The number of the engine's group of GPUs.")] = None
    simulated: Annotated[int | None, doc("Number of the allocation that a scenario fails.")] = None
    message: Annotated[str, doc("The end in one sentence for people.")] = ""
    hint: Annotated[str, doc("What a person can do.")] = ""

    @property
    def retryable(self) -> bool:
        """Whether a new start with the same settings may succeed."""
        return self.kind in ("killed", "raced", "crash", "stalled", "unknown")

    @property
    def is_oom(self) -> bool:
        """Whether a start with other settings may succeed."""
        return self.kind in ("out_of_memory", "host_memory", "hang")

    def record(self) -> Document:
        """Return the facts of this end for a run's record, without unknown facts and the hint."""
        facts = {**to_builtins(self), "hint": None}
        return {name: value for name, value in facts.items() if value not in (None, "")}

    @property
    def error(self) -> TurbofitError:
        """The error to raise for this end; its type sets turbofit's exit code."""
        kinds: dict[EndKind, type[TurbofitError]] = {
            "out_of_memory": OutOfMemoryError, "host_memory": OutOfMemoryError,
            "hang": DoesNotFitError,
        }  # fmt: skip
        return kinds.get(self.kind, LaunchError)(self.message, hint=self.hint)


def exit_words(code: int | None) -> str:
    """Return a process's exit status in words; ``code`` is None while the process runs."""
    if code is None:
        return "no exit: its server lives and answers no request"
    number = signal_of(code)
    return f"signal {signal_name(number)}" if number else f"exit code {code}"


def signal_of(code: int | None) -> int:
    """Return the number of the signal that ended a process; 0 if no signal ended it.

    ``code`` is the exit status as Python gives it (-9) or as a shell gives it (137).
    """
    if code is None:
        return 0
    if code < 0:
        return -code
    of_a_shell = 128 < code <= 192  # there are 64 signals; 255 is -1
    return code - 128 if of_a_shell else 0


def signal_name(number: int) -> str:
    """Return a signal's name, or its number as a text if it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


class End(AnyEnd):
    """How an engine ended when it was launched."""

    phase: Phase | Literal[""] = ""


class RehearsedCase(Struct):
    """The memory that the engine took in one worst case."""

    name: str
    peak: Annotated[tuple[int, ...], doc("The most bytes of the engine on each GPU.")]
    transient: Annotated[tuple[int, ...], doc("Bytes of the case's transient term, on each GPU.")]
    pinned: Annotated[int, doc("Bytes of pinned host memory.")]


class RehearsedCache(Struct):
    """The sizes of the KV cache that the engine made, in bytes, and the cache's tokens.

    ``free`` is what each GPU had free when the cache was sized, ``region`` what the cache took of
    it. ``object_size`` and ``slab_size`` are LMDeploy's own units of the cache. A value is None if
    the engine ended before it made this part of the cache.
    """

    free: tuple[int | None, ...]
    region: tuple[int | None, ...]
    object_size: int | None
    slab_size: int | None
    tokens: int | None


class RehearsedTogether(Struct):
    """Terms of the ledger whose memory a rehearsal measures only as a sum.

    ``bytes`` and ``rehearsed`` have one number for each GPU.
    """

    line: Annotated[str, doc("The common name of the terms, such as weights.")]
    terms: Annotated[tuple[str, ...], doc("The terms of the ledger.")]
    bytes: Annotated[tuple[int, ...], doc("Forecast bytes of all these terms together.")]
    rehearsed: Annotated[
        tuple[int | None, ...], doc("Bytes that the engine took for all these terms.")
    ]


class Moment(Struct):
    """One phase of a rehearsal: the bytes in use on each GPU of the engine's group.

    Bytes of other programs are included.
    """

    phase: Annotated[str, doc("The engine's phase, or case NAME.")]
    peak: Annotated[tuple[int, ...], doc("The most bytes in use during the phase.")]
    end: Annotated[tuple[int, ...], doc("Bytes at the end of the phase.")]
    image: Annotated[bool, doc("Whether the phase processes images.")] = False


class Rehearsal(Struct):
    """A run of the real engine on pretend GPUs; its answers and its speed are not real.

    Pretend GPUs cannot measure the memory in ``not_known``: its bytes are those of the forecast.
    """

    outcome: Annotated[
        Literal["served", "out_of_memory", "hang", "failed"], doc("How the run ended.")
    ]
    seconds: Annotated[float, doc("Wall time of the rehearsal; never a speed.")]
    engine_version: str
    cases: tuple[RehearsedCase, ...]
    cache: RehearsedCache
    death: AnyEnd | None
    not_known: Annotated[tuple[str, ...], doc("Memory that pretend GPUs cannot measure.")] = ()
    timeline: Annotated[tuple[Moment, ...], doc("All phases of the run, in order.")] = ()
    together: tuple[RehearsedTogether, ...] = ()
