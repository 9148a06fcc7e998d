"""Fits the constants of a card to all rows, or to the rows of all sources but one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import log
from typing import Final

from msgspec.structs import replace

from bench.speed.forecast import Setup
from bench.speed.score import Score, loss, score
from turbofit.planning.speed import Rates

#: Constants on which published speeds depend; the constants of links are in bench/topology.
FITTED: Final = ("memory_efficiency", "compute_efficiency", "layer_seconds")
_LARGEST_SHARE: Final = 0.95
#: The least gain for which a constant moves by a factor of e from its start.
_INERTIA: Final = 0.01
_STEPS: Final = (1.5, 1.2, 1.07, 1.03)


def fit(setups: Sequence[Setup], begin: Rates) -> Rates:
    """Fit constants to these rows, starting from ``begin``."""
    return _descend(lambda figures: loss(setups, figures), begin, FITTED, _STEPS)


def left_out_scores(setups: Sequence[Setup], begin: Rates) -> list[Score]:
    """Score each row with constants that were fitted without the row's source.

    Only rows of LMDeploy are fitted.
    """
    found = []
    for source in dict.fromkeys(one.row.source for one in setups):
        others = [one for one in setups if one.row.source != source and one.row.of_lmdeploy]
        figures = fit(others, begin) if others else begin
        found += [score(one, figures) for one in setups if one.row.source == source]
    return found


def _descend(
    cost: Callable[[Rates], float], begin: Rates, names: Sequence[str], steps: Sequence[float]
) -> Rates:
    """Return the constants of least cost; the descent starts at ``begin`` and is pulled to it.

    Args:
        cost: the cost of a set of constants.
        begin: all constants.
        names: the constants that may change.
        steps: factors to try, the largest first.
    """

    def pulled(figures: Rates) -> float:
        away = sum(abs(log(getattr(figures, n) / getattr(begin, n))) for n in names)
        return cost(figures) + _INERTIA * away

    best, least = begin, pulled(begin)
    for step in steps:
        moved = True
        while moved:
            moved = False
            for tried in _neighbours(best, names, step):
                found = pulled(tried)
                if found < least - 1e-9:
                    best, least, moved = tried, found, True
                    break
    return best


def _neighbours(figures: Rates, names: Sequence[str], step: float) -> Iterator[Rates]:
    for name in names:
        for factor in (step, 1 / step):
            value = getattr(figures, name) * factor
            if name.endswith(("efficiency", "factor")) and value > _LARGEST_SHARE:
                continue
            yield replace(figures, **{name: value})
