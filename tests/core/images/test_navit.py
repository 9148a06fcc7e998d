"""Kimi-K2.5's budget of patches: the worst image, and images that a lower limit resizes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.core.images.rules import BUDGET
from tests.sweep import part

pixels = st.integers(1, 24 * 14) | st.integers(1, 4000)


@pytest.mark.parametrize(("side", "budget"), [(4, 3), (8, 5), (12, 40), (12, 72), (16, 200)])
def test_the_worst_is_attained(side, budget):
    """Of every number of patches, with nothing and with most of one over."""
    rule = replace(BUDGET, max_pixels=budget * 14**2, side=side)
    edges = [count * 14 + over for count in range(2 * side) for over in (1, 6, 12, 13)]
    most = max(rule.units(width, height) for width in edges for height in edges)
    assert most <= rule.worst_units() == rule.units(*rule.worst_size())
    assert BUDGET.worst_units() == 17_856  # of a budget of 16,384
    assert BUDGET.tokens(*BUDGET.worst_size()) == 4464


@settings(max_examples=part(200, 5))
@given(pixels, pixels, st.integers(2, 40))
def test_a_resized_image_takes_what_a_lower_limit_gives(width, height, share):
    limit = BUDGET.max_pixels // share
    resized = BUDGET.stretched((width, height), limit)
    assert BUDGET.units(*resized) == BUDGET.units(width, height, limit)
