from __future__ import annotations

import math

import pytest

from turbofit.launch.tune.search import Surrogate, below, expected_improvement


def test_without_a_measurement_the_forecast_stands() -> None:
    mean, deviation = Surrogate([], []).predict((0.0,))
    assert mean == 0
    assert deviation == pytest.approx(math.sqrt(1.0 + 0.3**2))


def test_one_measurement_tells_of_all_and_most_of_its_neighbours() -> None:
    """The first one settles by what factor the forecasts are wrong everywhere."""
    surrogate = Surrogate([(0.0,)], [0.5])
    means = [surrogate.predict((x,)) for x in (0.0, 1.0, 4.0)]
    assert [round(mean, 2) for mean, _ in means] == [0.5, 0.48, 0.46]
    deviations = [deviation for _, deviation in means]
    assert deviations == sorted(deviations)
    assert deviations[0] < 0.05


def test_it_goes_through_what_was_measured() -> None:
    points = [(float(x), float(y)) for x in range(4) for y in range(3)]
    seen = [math.sin(x) - 0.3 * y for x, y in points]
    surrogate = Surrogate(points, seen)
    for point, value in zip(points, seen, strict=True):
        assert surrogate.predict(point)[0] == pytest.approx(value, abs=0.03)


def test_the_same_point_twice_is_its_mean() -> None:
    assert Surrogate([(0.0,), (0.0,)], [0.2, 0.4]).predict((0.0,))[0] == pytest.approx(
        0.3, abs=0.01
    )


def test_expected_improvement_wants_what_is_good_or_unknown() -> None:
    assert expected_improvement(1.0, 0.1, 0.0) == pytest.approx(1.0)
    assert expected_improvement(0.0, 1.0, 0.0) == pytest.approx(1 / math.sqrt(2 * math.pi))
    assert expected_improvement(-3.0, 0.1, 0.0) < 1e-9
    assert expected_improvement(0.5, 0.0, 0.2) == pytest.approx(0.3)
    assert below(0.0, -1.0, 0.5) == pytest.approx(0.977, abs=1e-3)
