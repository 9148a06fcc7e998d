"""How the forecast ranks the shapes of each case, and how far off its ratios are."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from statistics import fmean

from bench.topology.cases import Case
from bench.topology.forecast import forecast
from turbofit.core.struct import Struct
from turbofit.tuner.speed.rates import Rates

__all__ = ["Score", "loss", "score"]

#: What a wrong winner costs a fit, in units of the logarithm of a ratio.
_LOST = 0.3


class Score(Struct):
    """One case: each further shape's figure over the first shape's, forecast and measured."""

    case: Case
    forecast: tuple[float, ...]
    measured: tuple[float, ...]
    won: bool

    @property
    def errors(self) -> tuple[float, ...]:
        """Logarithms of forecast over measured; plus means that further GPUs were overrated."""
        return tuple(log(f / m) for f, m in zip(self.forecast, self.measured, strict=True))


def score(case: Case, figures: Rates) -> Score:
    """One case under these constants."""
    rates = [forecast(case, shape, figures) for shape in case.shapes]
    values = [shape.value for shape in case.shapes]
    return Score(
        case=case,
        forecast=tuple(rate / rates[0] for rate in rates[1:]),
        measured=tuple(value / values[0] for value in values[1:]),
        won=_first(rates) == _first(values),
    )


def loss(cases: Sequence[Case], figures: Rates) -> float:
    """The mean over cases of the mean absolute error, and something for each wrong winner."""
    scores = [score(case, figures) for case in cases]
    return fmean(
        fmean(abs(error) for error in one.errors) + (0.0 if one.won else _LOST) for one in scores
    )


def _first(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])
