from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sweep import part
from turbofit.core.errors import UsageError
from turbofit.core.images import TileRule

TILES = TileRule(tile_size=448, tokens_per_tile=256, max_dynamic_patch=12)

side = st.integers(1, 6000)


@settings(max_examples=part(300, 3))
@given(side, side, st.integers(1, 40), st.booleans(), st.integers(1, 6))
def test_no_image_exceeds_the_worst_tiles(width, height, limit, thumbnail, smallest):
    rule = TileRule(
        tile_size=448, tokens_per_tile=256, max_dynamic_patch=12, thumbnail=thumbnail,
        min_dynamic_patch=smallest,
    )  # fmt: skip
    assert rule.units(width, height, limit) <= rule.worst_units(limit)


@pytest.mark.parametrize("limit", [*range(14), 24, 40, 128])
def test_the_worst_tiles_are_reached(limit):
    sizes = [(1, max(limit, 1)), (448, 448 * max(limit, 1))]
    assert TILES.worst_units(limit) == max(TILES.units(*size, limit) for size in sizes)


@given(st.integers(0, 40), st.integers(1, 24), st.booleans())
def test_largest_tile_limit(budget, own, thumbnail):
    rule = TileRule(tile_size=448, tokens_per_tile=256, max_dynamic_patch=own, thumbnail=thumbnail)
    limit = rule.largest_limit(budget)
    fits = [n for n in range(1, own + 1) if rule.worst_units(n) <= budget]
    assert limit == (max(fits) if fits else None)


def test_what_a_client_can_ask_for():
    assert TILES.exposed_limit == 24
    assert TILES.worst_units(TILES.exposed_limit) == 25
    hf = TileRule(tile_size=448, tokens_per_tile=256, max_dynamic_patch=12, client_knobs=False)
    assert hf.exposed_limit == 12


@pytest.mark.parametrize("thumbnail", [True, False])
def test_an_image_of_so_many_units_can_be_made(thumbnail):
    rule = TileRule(tile_size=448, tokens_per_tile=256, max_dynamic_patch=40, thumbnail=thumbnail)
    for units in range(1, 40):
        if units != rule.unmade_units:
            image = rule.image_of(units)
            assert rule.with_limit(image.knobs["max_dynamic_patch"]).units(*image.size) == units


def test_hostile_limits_are_refused_at_once():
    with pytest.raises(UsageError):
        TILES.units(10, 10, 10**9)
    with pytest.raises(UsageError):
        TILES.worst_units(10**9)
