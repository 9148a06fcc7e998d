from __future__ import annotations

from statistics import median

import pytest

from bench.tune.__main__ import BAR, curves, grid, one


def test_there_are_enough_curves_and_they_are_read_between_their_points() -> None:
    found = curves()
    assert len(found) >= 12
    for curve in found:
        for rows, tokens in curve.points.items():
            assert curve.tokens(rows) == pytest.approx(tokens)
        assert curve.tokens(0.5) == curve.points[1] if 1 in curve.points else True
        low, high = sorted(curve.points)[:2]
        ends = sorted((curve.points[low], curve.points[high]))
        assert ends[0] <= curve.tokens((low + high) / 2) <= ends[1]


def test_one_curve_is_tuned_to_the_bar() -> None:
    curve = curves()[0]
    found, at_once = grid(curve)
    outcomes = [one(curve, found, at_once, seed) for seed in range(5)]
    assert median(outcome.tuned for outcome in outcomes) >= BAR
    assert all(outcome.starts <= 12 for outcome in outcomes)
