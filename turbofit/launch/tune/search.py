"""Which settings to try next, and when to stop: the forecast is the prior, measurements correct it.

Gaussian processes learn by what factor the forecasts of requests a second, TTFT and TPOT are wrong
and how that changes with the settings. Next is what promises the largest improvement that keeps the
SLO (expected improvement times the probability of keeping it).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.launch.tune.slo import LIMITS
from turbofit.launch.tune.surrogate import Surrogate, below, expected_improvement

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turbofit.core.tuning import SpeedFigures, TrialForecast

__all__ = ["SearchPoint", "TrialSearch"]

#: What a start must promise to be worth it, as a share of the best.
_WORTH: Final = 0.002
#: Measurements before it may stop.
_LEAST: Final = 4
#: The value of settings with which the engine died, for the model of their neighbours: nothing was
#: served.
_DEAD: Final = -1.5


class SearchPoint(NamedTuple):
    """Settings that can be tried: where they lie among the others, and their forecast."""

    point: tuple[float, ...]
    forecast: TrialForecast


class TrialSearch:
    """One search.

    Args:
        options: all that can be tried; the first is tried first.
        slo: seconds by what is limited.
        latency: whether the median time of an answer decides, not requests a second.
        at_once: requests under way, for the time of an answer.
    """

    def __init__(
        self,
        options: Sequence[SearchPoint],
        slo: Mapping[str, float],
        *,
        latency: bool,
        at_once: float,
    ) -> None:
        self._options, self._slo, self._latency = options, dict(slo), latency
        self._at_once = at_once
        self._seen: dict[int, SpeedFigures | None] = {}

    def tell(self, index: int, figures: SpeedFigures | None) -> None:
        """What was measured; None where the engine died."""
        self._seen[index] = figures

    def next(self) -> int | None:
        """What to try now; None where nothing promises enough."""
        left = [index for index in range(len(self._options)) if index not in self._seen]
        if not left:
            return None
        if not self._seen:
            return left[0]
        value = self._surrogate("value")
        limits = {name: self._surrogate(name) for name in self._slo}
        good = [index for index, figures in self._seen.items() if self._keeps(figures)]
        best = max((self._smoothed(index, value) for index in good), default=None)
        scores = {index: self._score(index, value, limits, best) for index in left}
        chosen = max(scores, key=lambda index: scores[index])
        enough = best is None or len(self._seen) < _LEAST or scores[chosen] > _WORTH
        return chosen if enough else None

    def best(self) -> int | None:
        """The best of what was measured and keeps the SLO.

        Its neighbours count too, since the highest of a dozen measurements is partly luck.
        """
        good = [index for index, figures in self._seen.items() if self._keeps(figures)]
        if not good:
            return None
        surrogate = self._surrogate("value")
        return max(good, key=lambda index: self._smoothed(index, surrogate))

    def _smoothed(self, index: int, surrogate: Surrogate) -> float:
        return self._prior(index) + surrogate.predict(self._options[index].point)[0]

    def _score(
        self, index: int, value: Surrogate, limits: Mapping[str, Surrogate], best: float | None
    ) -> float:
        point = self._options[index].point
        keeps = 1.0
        for name, surrogate in limits.items():
            mean, deviation = surrogate.predict(point)
            at = self._forecast(index, name) + mean
            keeps *= below(math.log(self._slo[name]), at, deviation)
        if best is None:
            return keeps
        mean, deviation = value.predict(point)
        return keeps * expected_improvement(self._prior(index) + mean, deviation, best)

    def _surrogate(self, name: str) -> Surrogate:
        points, residuals = [], []
        for index, figures in self._seen.items():
            if name == "value":
                residual = _DEAD if figures is None else self._value(index) - self._prior(index)
            elif figures is None:
                continue
            else:
                seen = max(getattr(figures, LIMITS[name]), 1e-6)
                residual = math.log(seen) - self._forecast(index, name)
            points.append(self._options[index].point)
            residuals.append(residual)
        return Surrogate(points, residuals)

    def _keeps(self, figures: SpeedFigures | None) -> bool:
        from turbofit.launch.tune.slo import meets

        return figures is not None and meets(figures, self._slo)

    def _value(self, index: int) -> float:
        """The logarithm of what is to be large."""
        figures = self._seen[index]
        if figures is None:
            return -math.inf
        if self._latency:
            return -math.log(max(figures.e2e_p50, 1e-6))
        return math.log(max(figures.requests_per_second, 1e-9))

    def _prior(self, index: int) -> float:
        forecast = self._options[index].forecast
        if self._latency:
            return -self._forecast(index, "e2e")
        return math.log(max(forecast.requests_per_second, 1e-9))

    def _forecast(self, index: int, name: str) -> float:
        forecast = self._options[index].forecast
        times = {
            "ttft": forecast.ttft,
            "tpot": forecast.tpot,
            "e2e": self._at_once / max(forecast.requests_per_second, 1e-9),
        }
        return math.log(max(times[name], 1e-6))
