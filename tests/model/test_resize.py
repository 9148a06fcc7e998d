"""The size that holds a picture where no parameter does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbofit.core.images import HdRule, PatchRule, TileRule
from turbofit.model.images import limit_bounds, units
from turbofit.model.resize import size_within

TILES = TileRule(tile_size=448, tokens_per_tile=256, max_dynamic_patch=12, client_knobs=False)
PATCHES = PatchRule(patch_size=14, merge=2, min_pixels=3136, max_pixels=12_845_056)
SIZES = st.tuples(st.integers(56, 4000), st.integers(56, 4000)).filter(
    lambda size: max(size) <= 60 * min(size)
)


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(1, 12))
def test_tiles_are_those_of_the_limit(size, limit) -> None:
    found = size_within(TILES, size, limit, 12)
    goal = units(TILES, *size, max_dynamic_patch=limit)
    assert units(TILES, *(found or size)) == goal


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(100, 16_000))
def test_patches_are_those_of_the_limit(size, windows) -> None:
    limit = windows * 784
    found = size_within(PATCHES, size, limit, PATCHES.max_pixels)
    goal = units(PATCHES, *size, **limit_bounds(PATCHES, limit))
    assert units(PATCHES, *(found or size)) == goal


@pytest.mark.parametrize(
    "rule",
    [TileRule.square(336, 576), HdRule(tile_size=336, tokens_per_tile=144, max_dynamic_patch=16)],
)
def test_where_every_image_takes_the_same_no_size_helps(rule) -> None:
    assert size_within(rule, (4000, 3000), 1, rule.max_dynamic_patch) is None
