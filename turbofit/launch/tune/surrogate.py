"""A Gaussian process over the error of a forecast, in plain Python.

A dozen measurements make a matrix of a dozen rows: scikit-learn or Optuna would bring numpy, scipy
or a database for eighty lines. The length scales are fixed, since a dozen points cannot tell them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Surrogate", "below", "expected_improvement"]

#: Logarithms: a forecast is wrong by a factor for all settings alike, by a factor that changes with
#: the settings, and a measurement is off by some percent.
_COMMON: Final = 1.0
_LOCAL: Final = 0.3
_NOISE: Final = 0.03


class Surrogate:
    """Fits residuals at points; predicts them elsewhere.

    Args:
        points: coordinates, in units of how far the residual stays alike.
        residuals: the logarithm of measured over forecast there.
    """

    def __init__(self, points: Sequence[Sequence[float]], residuals: Sequence[float]) -> None:
        self._points = list(points)
        count = len(self._points)
        rows = [
            [_covariance(a, b) + (_NOISE**2 if i == j else 0.0) for j, b in enumerate(points)]
            for i, a in enumerate(points)
        ]
        self._lower = _cholesky(rows)
        forward = _solve_lower(self._lower, residuals)
        self._weights = _solve_upper(self._lower, forward) if count else []

    def predict(self, point: Sequence[float]) -> tuple[float, float]:
        """Mean and standard deviation of the residual at a point."""
        towards = [_covariance(point, other) for other in self._points]
        mean = sum(k * w for k, w in zip(towards, self._weights, strict=True))
        explained = _solve_lower(self._lower, towards)
        variance = _covariance(point, point) - sum(v * v for v in explained)
        return mean, math.sqrt(max(variance, 1e-12))


def expected_improvement(mean: float, deviation: float, best: float) -> float:
    """By how much a value beats the best on average, where it beats it."""
    if deviation <= 0:
        return max(0.0, mean - best)
    ahead = (mean - best) / deviation
    density = math.exp(-ahead * ahead / 2) / math.sqrt(2 * math.pi)
    return (mean - best) * _normal(ahead) + deviation * density


def below(limit: float, mean: float, deviation: float) -> float:
    """The probability that a value is below a limit."""
    return _normal((limit - mean) / max(deviation, 1e-9))


def _normal(value: float) -> float:
    return (1 + math.erf(value / math.sqrt(2))) / 2


def _covariance(one: Sequence[float], other: Sequence[float]) -> float:
    """Of a common factor and of one that changes smoothly (Matérn 3/2)."""
    far = math.sqrt(3 * sum((a - b) ** 2 for a, b in zip(one, other, strict=True)))
    return _COMMON**2 + _LOCAL**2 * (1 + far) * math.exp(-far)


def _cholesky(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    lower: list[list[float]] = []
    for i, row in enumerate(rows):
        made: list[float] = []
        for j in range(i):
            made.append((row[j] - sum(made[k] * lower[j][k] for k in range(j))) / lower[j][j])
        made.append(math.sqrt(max(row[i] - sum(value * value for value in made), 1e-12)))
        lower.append(made)
    return lower


def _solve_lower(lower: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    found: list[float] = []
    for row, value in zip(lower, right, strict=True):
        found.append((value - sum(a * b for a, b in zip(row, found, strict=False))) / row[-1])
    return found


def _solve_upper(lower: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """With the transpose of a lower matrix."""
    found = [0.0] * len(right)
    for i in range(len(right) - 1, -1, -1):
        rest = sum(lower[j][i] * found[j] for j in range(i + 1, len(right)))
        found[i] = (right[i] - rest) / lower[i][i]
    return found
