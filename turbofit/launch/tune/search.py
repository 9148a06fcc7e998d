"""Chooses the settings to try next, and when to stop: forecasts are the prior of its model.

Gaussian processes learn by what factor the forecasts of requests a second, TTFT and TPOT are wrong,
and how that factor changes with the settings. The next trial has the largest expected improvement,
times the probability of keeping the SLO. An SLO, such as ``ttft=2s,tpot=50ms``, limits the times of
90 % of the requests.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.core.errors import UsageError
from turbofit.core.units import parse_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turbofit.core.tuning import SpeedFigures, TrialForecast


#: The times that an SLO can limit, and the measured figure that must stay below each limit.
LIMITS: Final = {"ttft": "ttft_p90", "tpot": "tpot_p90", "e2e": "e2e_p90"}
#: The share of failed requests that is tolerated without another limit.
_FAILING: Final = 0.01


def parse_slo(text: str) -> dict[str, float]:
    """Seconds by the name of the limit; a `UsageError` if an entry is no limit or stands twice."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, sign, value = part.strip().partition("=")
        if not sign or name not in LIMITS or name in limits:
            raise UsageError(
                f"--slo {part.strip()!r} is no limit, or stands twice",
                hint="write it as ttft=2s,tpot=50ms,e2e=20s",
            )
        limits[name] = parse_seconds(value, f"--slo {name}")
    return limits


def meets(figures: SpeedFigures, slo: Mapping[str, float]) -> bool:
    """Whether measured figures keep the limits, and nearly all requests were answered."""
    every = figures.answered + figures.failed
    if not figures.answered or figures.failed > _FAILING * every:
        return False
    return all(getattr(figures, LIMITS[name]) <= limit for name, limit in slo.items())


#: The expected improvement, as a share of the best, that a further start must promise.
_WORTH: Final = 0.002
#: Measurements before the search may stop.
_LEAST: Final = 4
#: The value of settings that killed the engine, in the model of their neighbours.
_DEAD: Final = -1.5


class SearchPoint(NamedTuple):
    """Settings that can be tried: their coordinates among the others, and their forecast."""

    point: tuple[float, ...]
    forecast: TrialForecast


class TrialSearch:
    """A search; it tries the first option first.

    With ``latency`` the median time of an answer decides instead of requests a second; ``at_once``
    is the number of requests under way.
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
        """Record what was measured; None means that the engine died."""
        self._seen[index] = figures

    def next(self) -> int | None:
        """The index of the option to try now; None if no option promises enough."""
        left = [index for index in range(len(self._options)) if index not in self._seen]
        if not left:
            return None
        if not self._seen:
            return left[0]
        value = self._surrogate("value")
        limits = {name: self._surrogate(name) for name in self._slo}
        best = max((self._smoothed(index, value) for index in self._good), default=None)
        scores = {index: self._score(index, value, limits, best) for index in left}
        chosen = max(scores, key=lambda index: scores[index])
        enough = best is None or len(self._seen) < _LEAST or scores[chosen] > _WORTH
        return chosen if enough else None

    def best(self) -> int | None:
        """The index of the best measured option that keeps the SLO; None if there is none.

        Its neighbours' values count too, since the highest of a dozen measurements is partly luck.
        """
        if not self._good:
            return None
        surrogate = self._surrogate("value")
        return max(self._good, key=lambda index: self._smoothed(index, surrogate))

    @property
    def _good(self) -> list[int]:
        """Indices of the measured options that keep the SLO."""
        measured = self._seen.items()
        return [index for index, figures in measured if figures and meets(figures, self._slo)]

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
                residual = _DEAD if figures is None else self._value(figures) - self._prior(index)
            elif figures is None:
                continue
            else:
                measured = max(getattr(figures, LIMITS[name]), 1e-6)
                residual = math.log(measured) - self._forecast(index, name)
            points.append(self._options[index].point)
            residuals.append(residual)
        return Surrogate(points, residuals)

    def _value(self, figures: SpeedFigures) -> float:
        """The logarithm of the value to maximise."""
        if self._latency:
            return -math.log(max(figures.e2e_p50, 1e-6))
        return math.log(max(figures.requests_per_second, 1e-9))

    def _prior(self, index: int) -> float:
        if self._latency:
            return -self._forecast(index, "e2e")
        return math.log(max(self._options[index].forecast.requests_per_second, 1e-9))

    def _forecast(self, index: int, name: str) -> float:
        forecast = self._options[index].forecast
        times = {
            "ttft": forecast.ttft,
            "tpot": forecast.tpot,
            "e2e": self._at_once / max(forecast.requests_per_second, 1e-9),
        }
        return math.log(max(times[name], 1e-6))


#: Standard deviations of logarithms: of the forecast's error that is common to all settings, of the
#: error that changes with the settings, and of a measurement.
_COMMON: Final = 1.0
_LOCAL: Final = 0.3
_NOISE: Final = 0.03


class Surrogate:
    """Fits residuals (logarithms of measured over forecast) at points; predicts them elsewhere.

    Coordinates are in units of the distance over which a residual changes little.
    """

    def __init__(self, points: Sequence[Sequence[float]], residuals: Sequence[float]) -> None:
        import numpy as np  # which LMDeploy brings

        self._points = points
        likeness = np.array([[_covariance(a, b) for b in points] for a in points])
        self._inverse = np.linalg.inv(likeness + _NOISE**2 * np.eye(len(points)))
        self._weights = self._inverse @ np.array(residuals)

    def predict(self, point: Sequence[float]) -> tuple[float, float]:
        """Mean and standard deviation of the residual at a point."""
        towards = [_covariance(point, other) for other in self._points]
        variance = _covariance(point, point) - float(towards @ self._inverse @ towards)
        return float(towards @ self._weights), math.sqrt(max(variance, 1e-12))


def expected_improvement(mean: float, deviation: float, best: float) -> float:
    """The average amount by which a value exceeds the best, counted as 0 where it does not."""
    if deviation <= 0:
        return max(0.0, mean - best)
    usual, ahead = NormalDist(), (mean - best) / deviation
    return (mean - best) * usual.cdf(ahead) + deviation * usual.pdf(ahead)


def below(limit: float, mean: float, deviation: float) -> float:
    return NormalDist(mean, max(deviation, 1e-9)).cdf(limit)


def _covariance(point: Sequence[float], other: Sequence[float]) -> float:
    """The covariance of a common factor and of one that changes smoothly (Matérn 3/2)."""
    far = math.sqrt(3 * sum((a - b) ** 2 for a, b in zip(point, other, strict=True)))
    return _COMMON**2 + _LOCAL**2 * (1 + far) * math.exp(-far)
