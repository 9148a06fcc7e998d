"""Ratios of timed steps to a forecast, and steps that contradict each other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.machine import MeasuredSteps, StepPoint
from turbofit.planning.steps import StepRatios, ratio_at, ratios_of, refuse_contradictions


def point(sequences: int, cached: int, seconds: float, **more: Any) -> StepPoint:
    return StepPoint(sequences=sequences, cached=cached, seconds=seconds, **more)


def steps(*points: StepPoint) -> MeasuredSteps:
    return MeasuredSteps(quant_policy=0, points=points)


def found(*points: StepPoint) -> StepRatios:
    return ratios_of(
        steps(*points),
        forward=lambda tokens: 0.01 + tokens * 1e-4,
        tower=lambda units: units * 0.02,
        pair=1e-9,
        context=1e-8,
    )


def test_without_points_all_stays_as_it_was() -> None:
    assert found() == StepRatios()
    assert ratio_at((), 7) == 1.0


def test_between_two_points_a_ratio_is_between_and_beyond_them_the_nearest() -> None:
    curve = ((1, 1.0), (100, 3.0))
    assert [ratio_at(curve, place) for place in (0, 1, 10, 100, 5000)] == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert all(a <= b for a, b in pairwise(ratio_at(curve, place) for place in range(1, 120)))


def test_the_cache_is_told_apart_by_two_contexts() -> None:
    few = point(8, 1_000, 2 * 0.0108 + 1_000 * 3e-8)
    ratios = found(few, point(8, 500_000, 2 * 0.0108 + 500_000 * 3e-8))
    assert ratios.context == pytest.approx(3.0)
    assert ratio_at(ratios.forward, 8) == pytest.approx(2.0)


def test_an_image_is_what_its_forward_has_beyond_its_prompt() -> None:
    prompt = point(1, 0, 2 * (0.01 + 257e-4 + 256**2 / 2 * 1e-9), prompt=256)
    ratios = found(prompt, point(1, 0, prompt.seconds + 3 * 0.02, prompt=256, units=1))
    assert (ratios.image, ratios.pair) == (((1, pytest.approx(3.0)),), pytest.approx(2.0))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (point(2, 64, 0.015), "2 sequences of 32 tokens took 15 ms, 1 sequence of 64 tokens"),
        (point(1, 99, 0.015), "1 sequence of 99 tokens took"),
        (point(1, 64, 0.015, prompt=9), "a prompt of 9 tokens took"),
        (point(1, 64, 0.015, units=1), "an image of 1 vision unit took"),
    ],
)
def test_more_work_in_less_time_is_refused(more: StepPoint, words: str) -> None:
    less = point(1, 64, 0.02)
    with pytest.raises(UsageError, match=words):
        refuse_contradictions(steps(less, more))
    refuse_contradictions(steps(less, point(2, 64, 0.0195)))
    refuse_contradictions(steps(less, point(2, 64, 0.015, spread=0.4)))
