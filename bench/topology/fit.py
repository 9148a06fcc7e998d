"""The constants of links, fitted to cases: to all of them, or to those of all sources but one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log
from typing import Final

from msgspec.structs import replace

from bench.topology.cases import Case
from bench.topology.score import Score, loss, score
from turbofit.tuner.speed.rates import Rates

__all__ = ["FITTED", "fit", "left_out_scores"]

#: What published ratios say something of; rates of one card have sources of their own.
FITTED: Final = (
    "host_bandwidth", "host_latency", "host_factor", "pcie_bandwidth", "pcie_latency",
    "nvlink_latency", "nvlink_efficiency",
)  # fmt: skip
_STEPS: Final = (2.0, 1.5, 1.25)
_LARGEST_SHARE: Final = 0.95
#: How much an e-fold away from the present value must gain.
_INERTIA: Final = 0.01


def fit(cases: Sequence[Case], begin: Rates) -> Rates:
    """Coordinate descent over factors, coarse first; ``begin`` is where it starts and pulls to."""

    def cost(figures: Rates) -> float:
        away = sum(abs(log(getattr(figures, n) / getattr(begin, n))) for n in FITTED)
        return loss(cases, figures) + _INERTIA * away

    best, least = begin, cost(begin)
    for step in _STEPS:
        moved = True
        while moved:
            moved = False
            for tried in _neighbours(best, step):
                found = cost(tried)
                if found < least - 1e-9:
                    best, least, moved = tried, found, True
                    break
    return best


def left_out_scores(cases: Sequence[Case], begin: Rates) -> list[Score]:
    """Each case under constants that its own source had no part in."""
    found = []
    for source in dict.fromkeys(case.source for case in cases):
        figures = fit([case for case in cases if case.source != source], begin)
        found += [score(case, figures) for case in cases if case.source == source]
    return found


def _neighbours(figures: Rates, step: float) -> Iterator[Rates]:
    for name in FITTED:
        for factor in (step, 1 / step):
            value = getattr(figures, name) * factor
            if name.endswith(("efficiency", "factor")) and value > _LARGEST_SHARE:
                continue
            yield replace(figures, **{name: value})
