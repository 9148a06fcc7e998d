"""The constants of links, fitted to cases: to all of them, or to those of all sources but one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bench.common.descent import descend
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


def fit(cases: Sequence[Case], begin: Rates) -> Rates:
    """The constants that these cases tell; ``begin`` is where the fit starts."""
    return descend(lambda figures: loss(cases, figures), begin, FITTED, _STEPS)


def left_out_scores(cases: Sequence[Case], begin: Rates) -> list[Score]:
    """Each case under constants that its own source had no part in."""
    found = []
    for source in dict.fromkeys(case.source for case in cases):
        figures = fit([case for case in cases if case.source != source], begin)
        found += [score(case, figures) for case in cases if case.source == source]
    return found
