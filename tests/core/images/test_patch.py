"""Qwen's patches: the most that an image becomes, and the limit that a number of them allows."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.core.images.rules import PATCHES, side
from tests.sweep import part
from turbofit.core.errors import UsageError
from turbofit.core.images import PatchRule

bounds = st.integers(1, 3_000_000) | st.integers(1, 200_000)
strips = st.tuples(st.floats(150, 200), st.integers(1, 60)).map(lambda s: (int(s[0] * s[1]), s[1]))


@settings(max_examples=part(1000, 5))
@given(st.tuples(side, side) | strips, bounds, bounds)
def test_no_image_exceeds_the_worst_patches(size, largest, smallest):
    """Long strips exceed small bounds."""
    rule = between(smallest, largest)
    if max(size) > 200 * min(size):
        with pytest.raises(UsageError):
            rule.units(*size)
        return
    units = rule.units(*size)
    assert units <= rule.worst_units()
    assert units % 4 == 0


def between(smallest: int, largest: int) -> PatchRule:
    return replace(PATCHES, min_pixels=smallest, max_pixels=largest)


@settings(max_examples=part(60, 5))
@given(st.integers(200_000, 13_000_000), st.integers(1, 4000))
def test_the_worst_patches_are_nearly_reached(largest, smallest):
    rule, windows = between(smallest, largest), largest // 784
    best = max(
        rule.units(28 * (windows // rows), 28 * rows)
        for rows in range(1, 12)
        if windows // rows <= 200 * rows
    )
    assert best >= rule.worst_units() - 4 * 11


@given(st.integers(0, 70_000))
def test_largest_pixel_limit(budget):
    limit = PATCHES.largest_limit(budget)
    if limit is None:
        assert PATCHES.worst_units(784) > budget
        return
    assert PATCHES.worst_units(limit) <= budget
    wider = limit + 784
    assert wider > PATCHES.max_pixels or PATCHES.worst_units(wider) > budget
