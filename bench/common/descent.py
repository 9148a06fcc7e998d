"""Constants of the forecast of speed, fitted by coordinate descent over factors, coarse first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import log
from typing import Final

from msgspec.structs import replace

from turbofit.tuner.speed.rates import Rates

__all__ = ["descend"]

_LARGEST_SHARE: Final = 0.95
#: How much an e-fold away from the begin must gain.
_INERTIA: Final = 0.01


def descend(
    cost: Callable[[Rates], float], begin: Rates, names: Sequence[str], steps: Sequence[float]
) -> Rates:
    """The constants of least cost; ``begin`` is where the descent starts and what it pulls to.

    Args:
        cost: of constants.
        begin: all constants.
        names: those that may move.
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
