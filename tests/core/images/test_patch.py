from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.sweep import part
from turbofit.core.errors import UsageError
from turbofit.core.images import PatchRule

PATCHES = PatchRule(patch_size=14, merge=2, min_pixels=3136, max_pixels=12_845_056)

side = st.integers(1, 6000)
bounds = st.integers(1, 3_000_000)


def between(smallest: int, largest: int) -> PatchRule:
    """The rule within other bounds."""
    return replace(PATCHES, min_pixels=smallest, max_pixels=largest)


@settings(max_examples=part(500, 3))
@given(side, side, bounds, bounds)
def test_no_image_exceeds_the_worst_patches(width, height, largest, smallest):
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(UsageError):
            between(smallest, largest).units(width, height)
        return
    found = between(smallest, largest).units(width, height)
    assert found <= between(smallest, largest).worst_units()
    assert found % 4 == 0


@settings(max_examples=part(60, 3))
@given(st.integers(200_000, 13_000_000), st.integers(1, 4000))
def test_the_worst_patches_are_nearly_reached(largest, smallest):
    """Grids that touch the bound exist a few windows below it at most."""
    bound = between(smallest, largest).worst_units()
    windows = largest // 784
    best = max(
        between(smallest, largest).units(28 * (windows // rows), 28 * rows)
        for rows in range(1, 12)
        if windows // rows <= 200 * rows
    )
    assert best >= bound - 4 * 11


def test_long_strips_exceed_small_bounds_and_are_covered():
    rng = random.Random(7)
    for _ in range(3000):
        largest, smallest = rng.randrange(1, 200_000), rng.randrange(1, 250_000)
        height = rng.randrange(1, 60)
        width = int(height * rng.uniform(150, 200))
        found = between(smallest, largest).units(width, height)
        assert found <= between(smallest, largest).worst_units()


@given(st.integers(0, 70_000))
def test_largest_pixel_limit(budget):
    limit = PATCHES.largest_limit(budget)
    if limit is None:
        assert PATCHES.worst_units(784) > budget
        return
    assert PATCHES.worst_units(limit) <= budget
    wider = limit + 784
    assert wider > PATCHES.max_pixels or PATCHES.worst_units(wider) > budget


def test_pixels_by_halves():
    assert PATCHES.exposed_limit == 12_845_056
    down = PATCHES.lower_limits()
    assert down[0] == PATCHES.max_pixels
    assert all(high > low and low % 784 == 0 for high, low in pairwise(down))
    assert down[-1] >= PATCHES.min_pixels
    below = PATCHES.limits_below(10_000)
    assert (below[0], below[-1], below.step) == (3136, 9408, 784)


def test_a_grid_is_as_square_as_windows_allow():
    assert [PATCHES.grid(units) for units in (1, 18, 24, 4 * 131)] == [
        [1, 2, 2], [1, 4, 4], [1, 4, 6], [1, 2, 262],
    ]  # fmt: skip


def test_bounds_that_leave_no_image_are_refused():
    with pytest.raises(UsageError, match="leave no image"):
        PATCHES.units(10, 10, 0)
