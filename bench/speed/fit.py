"""The constants of one card, fitted to rows: to all of them, or to those of all sources but one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bench.common.descent import descend
from bench.speed.forecast import Setup
from bench.speed.score import Score, loss, score
from turbofit.tuner.speed.rates import Rates

__all__ = ["FITTED", "fit", "left_out_scores"]

#: What published speeds say something of; constants of links are fitted by `bench/topology`.
FITTED: Final = ("memory_efficiency", "compute_efficiency", "layer_seconds")
_STEPS: Final = (1.5, 1.2, 1.07, 1.03)


def fit(setups: Sequence[Setup], begin: Rates) -> Rates:
    """The constants that these rows tell; ``begin`` is where the fit starts."""
    return descend(lambda figures: loss(setups, figures), begin, FITTED, _STEPS)


def left_out_scores(setups: Sequence[Setup], begin: Rates) -> list[Score]:
    """Each row under constants that its own source had no part in.

    Only rows of LMDeploy are fitted.
    """
    found = []
    for source in dict.fromkeys(one.row.source for one in setups):
        others = [one for one in setups if one.row.source != source and one.row.of_lmdeploy]
        figures = fit(others, begin) if others else begin
        found += [score(one, figures) for one in setups if one.row.source == source]
    return found
