from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbofit.core.errors import UsageError
from turbofit.core.images import PatchRule, TileRule
from turbofit.model.images import (
    client_limit,
    exposed_limit,
    largest_limit,
    limits_down,
    unit_tokens,
    units,
    worst_units,
)

TILES = TileRule(tile_size=448, tokens_per_tile=256, max_dynamic_patch=12)
PATCHES = PatchRule(patch_size=14, merge=2, min_pixels=3136, max_pixels=12_845_056)

side = st.integers(1, 6000)
bounds = st.integers(1, 3_000_000)


@pytest.mark.parametrize(
    ("size", "limit", "tiles"),
    [
        ((448, 448), None, 1), ((800, 600), None, 13), ((800, 600), 4, 5),
        ((1920, 1080), None, 9), ((1920, 1080), 4, 3), ((1, 12), None, 13),
    ],
)  # fmt: skip
def test_known_tiles(size, limit, tiles):
    found = units(TILES, *size, max_dynamic_patch=limit)
    assert (found, unit_tokens(TILES, found)) == (tiles, 256 * tiles)


def test_known_patches():
    assert units(PATCHES, 1920, 1080) == 78 * 138
    assert unit_tokens(PATCHES, 78 * 138) == 2691
    assert units(PATCHES, 4032, 3024) == 62_208  # a 12-megapixel photo
    assert worst_units(PATCHES) == 65_536


def test_what_a_client_can_ask_for():
    assert client_limit(TILES) == 12
    assert [client_limit(TILES, detail=d) for d in ("low", "medium", "high", "auto")] == [
        6, 12, 24, 12,
    ]  # fmt: skip
    assert client_limit(TILES, detail="low", max_dynamic_patch=3) == 3
    assert exposed_limit(TILES) == 24
    assert worst_units(TILES, max_dynamic_patch=exposed_limit(TILES)) == 25
    hf = TileRule(tile_size=448, tokens_per_tile=256, max_dynamic_patch=12, client_knobs=False)
    assert (client_limit(hf, detail="high", max_dynamic_patch=40), exposed_limit(hf)) == (12, 12)
    assert exposed_limit(PATCHES) == 12_845_056


@settings(max_examples=300, deadline=None)
@given(side, side, st.integers(1, 40), st.booleans(), st.integers(1, 6))
def test_no_image_exceeds_the_worst_tiles(width, height, limit, thumbnail, smallest):
    rule = TileRule(
        tile_size=448, tokens_per_tile=256, max_dynamic_patch=12, thumbnail=thumbnail,
        min_dynamic_patch=smallest,
    )  # fmt: skip
    assert units(rule, width, height, max_dynamic_patch=limit) <= worst_units(
        rule, max_dynamic_patch=limit
    )


@pytest.mark.parametrize("limit", [*range(14), 24, 40, 128])
def test_the_worst_tiles_are_reached(limit):
    sizes = [(1, max(limit, 1)), (448, 448 * max(limit, 1))]
    assert worst_units(TILES, max_dynamic_patch=limit) == max(
        units(TILES, *size, max_dynamic_patch=limit) for size in sizes
    )


@settings(max_examples=500, deadline=None)
@given(side, side, bounds, bounds)
def test_no_image_exceeds_the_worst_patches(width, height, largest, smallest):
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(UsageError):
            units(PATCHES, width, height, max_pixels=largest, min_pixels=smallest)
        return
    found = units(PATCHES, width, height, max_pixels=largest, min_pixels=smallest)
    assert found <= worst_units(PATCHES, max_pixels=largest, min_pixels=smallest)
    assert found % 4 == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(200_000, 13_000_000), st.integers(1, 4000))
def test_the_worst_patches_are_nearly_reached(largest, smallest):
    """Grids that touch the bound exist a few windows below it at most."""
    bound = worst_units(PATCHES, max_pixels=largest, min_pixels=smallest)
    windows = largest // 784
    best = max(
        units(PATCHES, 28 * (windows // rows), 28 * rows, max_pixels=largest, min_pixels=smallest)
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
        found = units(PATCHES, width, height, max_pixels=largest, min_pixels=smallest)
        assert found <= worst_units(PATCHES, max_pixels=largest, min_pixels=smallest)


@given(st.integers(0, 40), st.integers(1, 24), st.booleans())
def test_largest_tile_limit(budget, own, thumbnail):
    rule = TileRule(tile_size=448, tokens_per_tile=256, max_dynamic_patch=own, thumbnail=thumbnail)
    limit = largest_limit(rule, budget)
    fits = [n for n in range(1, own + 1) if worst_units(rule, max_dynamic_patch=n) <= budget]
    assert limit == (max(fits) if fits else None)


@given(st.integers(0, 70_000))
def test_largest_pixel_limit(budget):
    limit = largest_limit(PATCHES, budget)
    if limit is None:
        assert worst_units(PATCHES, max_pixels=784) > budget
        return
    assert worst_units(PATCHES, max_pixels=limit) <= budget
    wider = limit + 784
    assert wider > PATCHES.max_pixels or worst_units(PATCHES, max_pixels=wider) > budget


def test_limits_down():
    assert limits_down(TILES) == tuple(range(12, 0, -1))
    down = limits_down(PATCHES)
    assert down[0] == PATCHES.max_pixels
    assert all(high > low and low % 784 == 0 for high, low in itertools.pairwise(down))
    assert down[-1] >= PATCHES.min_pixels


@pytest.mark.parametrize("rule", [TILES, PATCHES])
def test_sizes_without_pixels(rule):
    with pytest.raises(UsageError):
        units(rule, 0, 10)


def test_hostile_limits_are_refused_at_once():
    with pytest.raises(UsageError):
        units(TILES, 10, 10, max_dynamic_patch=10**9)
    with pytest.raises(UsageError):
        worst_units(TILES, max_dynamic_patch=10**9)
    with pytest.raises(UsageError):
        units(PATCHES, 10, 10, max_pixels=0)
