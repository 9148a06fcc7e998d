"""What each process held, by card and phase, from its timeline. Sizes are bytes.

A process is marked once it has a CUDA context; what it did before counts with its first phase.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from turbofit.pretend.usage import BEFORE, Usage

__all__ = ["HeldBytes", "PhaseSpan", "combined", "held_by"]


@dataclass
class PhaseSpan:
    """One phase of one process on one card: bytes at its end and at most, its context left out."""

    end: int = 0
    peak: int = 0


@dataclass
class HeldBytes:
    """One process: its context on each card, and its spans by card and phase."""

    pid: int = 0
    command: str = ""
    contexts: dict[int, int] = field(default_factory=dict)
    spans: dict[int, dict[str, PhaseSpan]] = field(default_factory=dict)

    def on(self, gpu: int, phase: str, order: Sequence[str]) -> PhaseSpan:
        """Its span in a phase; where the phase was not marked, what the process held before it."""
        spans = self.spans.get(gpu, {})
        if phase in spans or "" in spans:  # the latter: never marked
            return spans.get(phase) or spans[""]
        earlier = order[: order.index(phase)] if phase in order else ()
        end = next((spans[name].end for name in reversed(earlier) if name in spans), 0)
        return PhaseSpan(end, end)


def held_by(usages: Iterable[Usage]) -> tuple[HeldBytes, ...]:
    """What the processes of a run held."""
    return tuple(_held(usage) for usage in usages)


def combined(held: Iterable[HeldBytes], gpu: int, phase: str, order: Sequence[str]) -> PhaseSpan:
    """All processes on a card in a phase, contexts included.

    The peak is the sum of the processes' own: exact where one of them allocates, else at most that.
    """
    total = PhaseSpan()
    for one in held:
        span, context = one.on(gpu, phase, order), one.contexts.get(gpu, 0)
        total.end += span.end + context
        total.peak += span.peak + context
    return total


def _held(usage: Usage) -> HeldBytes:
    spans = {gpu: _spans(peaks, usage.ends[gpu]) for gpu, peaks in usage.phases.items()}
    return HeldBytes(usage.pid, usage.command, usage.contexts, spans)


def _spans(peaks: Mapping[str, int], ends: Mapping[str, int]) -> dict[str, PhaseSpan]:
    """By phase; what came before the first mark belongs to that, or to "" where none came."""
    spans = {name: PhaseSpan(ends[name], peak) for name, peak in peaks.items()}
    before = spans.pop(BEFORE, None)
    if before is None:
        return spans
    if not spans:
        return {"": before}
    first = next(iter(spans.values()))
    first.peak = max(first.peak, before.peak)
    return spans
