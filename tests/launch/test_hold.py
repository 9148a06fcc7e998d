from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from tests.fixtures.plans import plausible_plan
from turbofit.core.model import PatchRule, TileRule
from turbofit.launch.hold import held_parameters, too_many_images
from turbofit.model.images import client_limit, units, worst_units

TILES = TileRule(tile_size=448, tokens_per_tile=256, max_dynamic_patch=12)
PATCHES = PatchRule(patch_size=14, merge=2, min_pixels=3136, max_pixels=12845056)
LIMITS = plausible_plan().limits
sizes = st.tuples(st.integers(1, 4000), st.integers(1, 4000)).filter(
    lambda size: max(size) < 150 * min(size)
)
values = st.one_of(
    st.none(), st.integers(-5, 200), st.booleans(), st.floats(allow_nan=False), st.text(max_size=3)
)


@given(
    size=sizes,
    patch=values,
    detail=st.sampled_from([None, "low", "medium", "high", "auto", 3]),
    planned=st.integers(1, 12),
)
def test_no_image_takes_more_tiles_than_planned(
    size: tuple[int, int], patch: Any, detail: Any, planned: int
) -> None:
    worst = worst_units(TILES, max_dynamic_patch=planned)
    limits = msgspec.structs.replace(LIMITS, max_dynamic_patch=planned, units_per_image=worst)
    asked = {"max_dynamic_patch": patch, "detail": detail, "other": 1}
    held = held_parameters(TILES, limits, size, asked)
    assert set(held) == {"max_dynamic_patch", "other"}
    assert units(TILES, *size, max_dynamic_patch=held["max_dynamic_patch"]) <= worst


@given(size=sizes, low=values, high=values, planned=st.integers(28 * 28 * 4, 12845056))
def test_no_image_takes_more_patches_than_planned(
    size: tuple[int, int], low: Any, high: Any, planned: int
) -> None:
    worst = worst_units(PATCHES, max_pixels=planned)
    limits = msgspec.structs.replace(
        LIMITS, vision_unit="patch", max_dynamic_patch=None, max_pixels_per_image=planned,
        units_per_image=worst,
    )  # fmt: skip
    held = held_parameters(PATCHES, limits, size, {"min_pixels": low, "max_pixels": high})
    assert 0 < held["min_pixels"] <= held["max_pixels"]
    assert units(PATCHES, *size, **held) <= worst


def test_what_is_within_the_plan_is_left_as_it_was() -> None:
    limits = msgspec.structs.replace(LIMITS, max_dynamic_patch=12, units_per_image=13)
    for asked in ({}, {"detail": "low"}, {"max_dynamic_patch": 3}, {"detail": "medium"}):
        held = held_parameters(TILES, limits, (1792, 1344), asked)
        assert held["max_dynamic_patch"] == client_limit(TILES, **asked)
    assert held_parameters(TILES, limits, (9, 9), {"detail": "high"})["max_dynamic_patch"] == 12


def test_a_plan_for_small_images_lowers_only_the_larger_ones() -> None:
    limits = msgspec.structs.replace(LIMITS, max_dynamic_patch=12, units_per_image=9)
    assert held_parameters(TILES, limits, (1920, 1080), {})["max_dynamic_patch"] == 12
    assert held_parameters(TILES, limits, (800, 600), {})["max_dynamic_patch"] == 8


def test_images_are_counted() -> None:
    assert too_many_images(LIMITS, 1) is None
    refusal = too_many_images(LIMITS, 3)
    assert refusal is not None
    assert "images=3" in refusal
