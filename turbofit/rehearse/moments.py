"""The phases of a rehearsal in order: what each card had in use at most, and at its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from turbofit.core.json_types import Document
from turbofit.core.plan import Moment
from turbofit.pretend.scenario import PretendGpu
from turbofit.rehearse.turbomind.ledger import RehearsedGpu

__all__ = ["moments", "torch_moments"]

#: Worst cases that carry images: the names of their terms begin so.
_IMAGES: Final = "case vision"


class _Lane(NamedTuple):
    """One card: bytes charged before the start, and after free memory was read; its phases.

    ``spans`` are (peak, end) by phase, in order; ``sized`` is the phase that begins when the engine
    reads free memory.
    """

    used: int
    late: int
    sized: str
    spans: Mapping[str, tuple[int, int]]

    def along(self, order: Sequence[str]) -> list[tuple[int, int]]:
        """(peak, end) in use in each phase; a card without the phase stays as it was."""
        base, held, found = self.used, 0, []
        for phase in order:
            base += self.late if phase == self.sized else 0
            peak, held = self.spans.get(phase, (held, held))
            found.append((base + peak, base + held))
        return found


def moments(cards: Sequence[RehearsedGpu], gpus: Sequence[PretendGpu]) -> tuple[Moment, ...]:
    """Moments of TurboMind's rehearsal.

    Args:
        cards: what each card held, by phase.
        gpus: the pretend machine's cards.
    """
    lanes = []
    for card, gpu in zip(cards, gpus, strict=True):
        spans = {name: (card.peak.get(name, end), end) for name, end in card.end.items()}
        lanes.append(_Lane(gpu.used, gpu.late, "cache", spans))
    return _moments(lanes)


def torch_moments(document: Document, gpus: Sequence[PretendGpu]) -> tuple[Moment, ...]:
    """Moments of a torch engine's rehearsal.

    Args:
        document: what ``torch_report`` returned.
        gpus: the scenario's cards.
    """
    lanes = []
    for card, gpu in zip(document["gpus"], gpus, strict=True):
        spans = {name: (one["peak"], one["held"]) for name, one in card["phases"].items()}
        lanes.append(_Lane(gpu.used, gpu.late, "cache", spans))
    return _moments(lanes)


def _moments(lanes: Sequence[_Lane]) -> tuple[Moment, ...]:
    order = _in_order([tuple(lane.spans) for lane in lanes])
    found = [lane.along(order) for lane in lanes]
    return tuple(
        Moment(
            phase=phase,
            peak=tuple(lane[i][0] for lane in found),
            end=tuple(lane[i][1] for lane in found),
            image=phase.startswith(_IMAGES),
        )
        for i, phase in enumerate(order)
    )


def _in_order(phases: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """All phases; one that only some cards have stands where they have it."""
    order: list[str] = []
    for card_phases in phases:
        at = 0
        for phase in card_phases:
            if phase in order:
                at = order.index(phase) + 1
            else:
                order.insert(at, phase)
                at += 1
    return tuple(order)
