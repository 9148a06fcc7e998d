"""A full cache: the formula beside the simulation that it stands for."""

from __future__ import annotations

import pytest

from tests.tuner.speed.simulated_cache import CASES, Case, formula, simulated
from turbofit.tuner.speed import crowd_of, rates


def test_all_run_where_the_cache_holds_all() -> None:
    assert crowd_of(8, 8, 0.33, 256, 0.75) == (8, 0)
    assert crowd_of(0.5, 1, 0.33, 256, 0.75) == (0.5, 0)


def test_more_requests_run_than_could_all_end_and_some_begin_again() -> None:
    few, many = (crowd_of(there, 8, 0.33, 256, 0.75) for there in (10, 1000))
    assert 8 < few.running < 10
    assert few.running < many.running == pytest.approx(8 * 1.33)
    assert 0 < few.again < many.again == pytest.approx(0.75 / (1 + 8 / 256))


def test_fewer_are_evicted_where_many_end_while_one_is_answered() -> None:
    long, short = (crowd_of(300, 200, 0.33, output, 0.75).again for output in (2000, 20))
    assert short < 0.2 * long


@pytest.mark.parametrize("room", [0.0, 0.03, 0.33, 0.9])
def test_a_larger_cache_runs_more_and_evicts_less(room: float) -> None:
    found = [crowd_of(64, fitting / 4, room, 256, 0.75) for fitting in range(4, 400)]
    running, again = zip(*found, strict=True)
    assert list(running) == sorted(running)
    assert list(again) == sorted(again, reverse=True)
    assert max(running) == 64


@pytest.mark.parametrize(("prompt", "output", "fitting"), [c for c in CASES if c[2] < 100])
@pytest.mark.parametrize("crowd", [1.3, 2.5])
def test_the_formula_is_near_the_simulation(prompt, output, fitting, crowd) -> None:
    """Answers of one length. Evictions are over where so few fit that they end in turn."""
    case = Case(prompt, output, fitting)
    running, again = simulated(case, crowd)
    said, recomputed = formula(case, crowd, rates().recomputed_share)
    assert said == pytest.approx(running, rel=0.06)
    most = max(again, simulated(case._replace(whole=True), crowd)[1])
    assert recomputed < max(most, 0.75) + 0.1
    if again:
        assert recomputed == pytest.approx(again, abs=0.2)
