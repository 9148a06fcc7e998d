"""What each process held, by card and phase, from its timeline. Sizes are bytes.

A process is marked once it has a CUDA context; what it did before counts with its first phase.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from turbofit.pretend.timeline import PINNED, Event, read_timeline

__all__ = ["Held", "Span", "combined", "read_held"]


@dataclass
class Span:
    """One phase of one process on one card: bytes at its end and at most, its context left out."""

    end: int = 0
    peak: int = 0


@dataclass
class Held:
    """One process: its context on each card, and its spans by card and phase."""

    pid: int = 0
    command: str = ""
    contexts: dict[int, int] = field(default_factory=dict)
    spans: dict[int, dict[str, Span]] = field(default_factory=dict)

    def on(self, gpu: int, phase: str, order: Sequence[str]) -> Span:
        """Its span in a phase; where it was not marked then, what it held after the one before."""
        own = self.spans.get(gpu, {})
        if phase in own or "" in own:  # the latter: never marked
            return own.get(phase) or own[""]
        earlier = order[: order.index(phase)] if phase in order else ()
        end = next((own[name].end for name in reversed(earlier) if name in own), 0)
        return Span(end, end)


def read_held(folder: Path) -> tuple[Held, ...]:
    """All processes that have a timeline in a folder."""
    return tuple(_read(read_timeline(path)) for path in sorted(folder.glob("*.timeline")))


def combined(held: Iterable[Held], gpu: int, phase: str, order: Sequence[str]) -> Span:
    """All processes on a card in a phase, contexts included.

    The peak is the sum of the processes' own: exact where one of them allocates, else at most that.
    """
    total = Span()
    for one in held:
        span, context = one.on(gpu, phase, order), one.contexts.get(gpu, 0)
        total.end += span.end + context
        total.peak += span.peak + context
    return total


def _read(events: Iterable[Event]) -> Held:
    held, phase = Held(), ""
    now: dict[int, int] = {}
    where: dict[str, int] = {}

    def hold(gpu: int, size: int) -> None:
        now[gpu] = size
        span = held.spans.setdefault(gpu, {}).setdefault(phase, Span())
        span.end = size
        span.peak = max(span.peak, size)

    for event in events:
        if event.tag == "I":
            held.pid = event.number(0)
        elif event.tag == "N":
            held.command = event.words[0]
        elif event.tag == "K":
            held.contexts[event.number(0)] = event.number(1)
        elif event.tag == "P":
            if not phase:
                held.spans = {gpu: {event.words[0]: s[""]} for gpu, s in held.spans.items()}
            phase = event.words[0]
            for gpu, size in now.items():
                hold(gpu, size)
        elif event.tag == "A" and event.number(1) != PINNED:
            where[event.words[5]] = event.number(0)
            hold(event.number(0), event.number(4))
        elif event.tag == "F" and event.words[0] in where:
            hold(where.pop(event.words[0]), event.number(1))
        elif event.tag == "R":
            hold(event.number(0), event.number(3))
    return held
