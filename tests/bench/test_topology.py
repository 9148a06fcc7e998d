"""The published cases: what is reported is what the code computes, and nothing is flattered."""

from __future__ import annotations

import math

import pytest
from msgspec.structs import replace

from bench.topology.__main__ import report
from bench.topology.cases import HERE, read_cases
from bench.topology.fit import FITTED, fit, left_out_scores
from bench.topology.forecast import forecast
from bench.topology.score import loss, score
from turbofit.tuner.speed.rates import rates

pytestmark = pytest.mark.slow

CASES = {case.id: case for case in read_cases()}


def test_the_results_are_reproduced() -> None:
    text, _ = report()
    assert (HERE / "RESULTS.md").read_text() == text


def test_cases_are_whole() -> None:
    assert len(CASES) == len(read_cases()) > 40
    for case in CASES.values():
        assert len(case.shapes) > 1
        assert case.source
        assert not case.contradicts or case.contradicts in CASES
        assert all(shape.value > 0 for shape in case.shapes)


@pytest.mark.parametrize("name", CASES)
def test_every_shape_has_a_forecast(name: str) -> None:
    for shape in CASES[name].shapes:
        assert math.isfinite(forecast(CASES[name], shape, rates()))


def test_scores_are_ratios_to_the_first_shape() -> None:
    case = CASES["trtllm017-h200-70b-128-2048"]
    found = score(case, rates())
    assert found.measured[0] == pytest.approx(8290.35 / 4165.68)
    assert found.won
    assert found.errors[0] == pytest.approx(math.log(found.forecast[0] / found.measured[0]))
    worse = replace(case, shapes=tuple(reversed(case.shapes)))
    assert score(worse, rates()).won


def test_a_fit_never_costs_more_and_moves_only_what_it_may() -> None:
    cases = [case for case in CASES.values() if "3090" in case.id and not case.left_out]
    found = fit(cases, rates(FITTED))
    assert loss(cases, found) <= loss(cases, rates(FITTED))
    fixed = set(type(found).__struct_fields__) - set(FITTED)
    assert all(getattr(found, name) == getattr(rates(), name) for name in fixed)


def test_a_source_has_no_part_in_its_own_forecast() -> None:
    cases = [case for case in CASES.values() if not case.left_out]
    begin = rates(FITTED)
    last = cases[-1].source
    others = [case for case in cases if case.source != last]
    alone = {one.case.id: one.forecast for one in left_out_scores(cases, begin)}
    figures = fit(others, begin)
    for case in cases:
        if case.source == last:
            assert score(case, figures).forecast == alone[case.id]
