"""InternVL's tiles: the most that an image becomes, and the limit that a number of them allows."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.core.images.rules import ASKED, side
from tests.sweep import part


@settings(max_examples=part(300, 5))
@given(side, side, st.integers(1, 40), st.booleans(), st.integers(1, 6))
def test_no_image_exceeds_the_worst_tiles(width, height, limit, thumbnail, smallest):
    rule = replace(ASKED, thumbnail=thumbnail, min_dynamic_patch=smallest)
    assert rule.units(width, height, limit) <= rule.worst_units(limit)


@given(st.integers(0, 40), st.integers(1, 24), st.booleans())
def test_largest_tile_limit(budget, own, thumbnail):
    rule = replace(ASKED, max_dynamic_patch=own, thumbnail=thumbnail)
    limit = rule.largest_limit(budget)
    fits = [n for n in range(1, own + 1) if rule.worst_units(n) <= budget]
    assert limit == (max(fits) if fits else None)


@pytest.mark.parametrize("thumbnail", [True, False])
def test_an_image_of_so_many_units_can_be_made(thumbnail):
    rule = replace(ASKED, max_dynamic_patch=40, thumbnail=thumbnail)
    for units in set(range(1, 40)) - ({2} if rule.thumbnail else set()):
        image = rule.image_of(units)
        assert rule.with_limit(image.knobs["max_dynamic_patch"]).units(*image.size) == units
    for limit in (*range(14), 24, 40, 128):  # the worst is reached
        sizes = [(1, max(limit, 1)), (448, 448 * max(limit, 1))]
        assert rule.worst_units(limit) == max(rule.units(*size, limit) for size in sizes)
