"""What holds for every rule."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.sweep import part
from turbofit.core.errors import UsageError
from turbofit.core.images import (
    AnyImageRule,
    AnyresRule,
    CanvasRule,
    CrossRule,
    HdRule,
    ImageRule,
    LongestEdgeRule,
    NavitRule,
    PatchRule,
    TileRule,
)
from turbofit.core.plan import Limits
from turbofit.model.presets import known_presets, load_preset

TILES = TileRule(tile_size=448, tokens_per_tile=256, max_dynamic_patch=12, client_knobs=False)
PATCHES = PatchRule(patch_size=14, merge=2, min_pixels=3136, max_pixels=12_845_056)
SQUARE = TileRule.square(336, 576)
PAGES = HdRule(tile_size=336, tokens_per_tile=144, max_dynamic_patch=16)
CROSS = CrossRule(tile_size=560, tokens_per_tile=1601, max_dynamic_patch=4, thumbnail=False)
GRIDS = AnyresRule(
    tile_size=336, tokens_per_tile=576, max_dynamic_patch=4,
    grids=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
)  # fmt: skip
CANVAS = CanvasRule(tile_size=336, tokens_per_tile=145, max_dynamic_patch=16)
LONGEST = LongestEdgeRule(tile_size=384, tokens_per_tile=81, max_dynamic_patch=16)
BUDGET = NavitRule(patch_size=14, merge=2, max_pixels=16384 * 14**2)
RULES: list[ImageRule] = [
    TILES, replace(TILES, client_knobs=True), PATCHES, replace(PATCHES, client_knobs=False), SQUARE,
    PAGES, CROSS, GRIDS, CANVAS, LONGEST, BUDGET,
]  # fmt: skip
SIZES = st.tuples(st.integers(56, 4000), st.integers(56, 4000)).filter(
    lambda size: max(size) <= 60 * min(size)
)


def test_each_class_is_tried_and_answers_everything() -> None:
    known = get_args(AnyImageRule)
    assert {type(rule) for rule in RULES} == set(known)
    for kind in known:
        answers = {name: getattr(kind, name, None) for name in dir(ImageRule)}
        left = [name for name, it in answers.items() if getattr(it, "__isabstractmethod__", False)]
        assert left == []
        assert {kind.limit_name, "client_knobs"} <= set(kind.__struct_fields__)
        assert kind.plan_limit_name in Limits.__struct_fields__


@pytest.mark.parametrize("rule", RULES)
def test_limits_and_units_agree(rule: ImageRule) -> None:
    assert rule.lower_limits()[0] <= rule.checkpoint_limit <= rule.exposed_limit
    most = rule.worst_units()
    assert rule.least_units <= most
    assert rule.largest_limit(0) is None
    assert rule.largest_limit(most) in (rule.checkpoint_limit, rule.lower_limits()[0])
    for limit in rule.lower_limits():
        lowered = rule.with_limit(limit)
        assert lowered.worst_units() == lowered.worst_units(limit) <= rule.worst_units(limit)
        assert set(rule.knobs(limit)) >= {rule.limit_name}
        assert lowered.units(640, 480) <= lowered.worst_units()
        assert lowered.tokens(640, 480) <= lowered.unit_tokens(lowered.units(640, 480))
        assert lowered.units(640, 480) <= lowered.units_within(lowered.tokens(640, 480))


@pytest.mark.parametrize("rule", RULES)
def test_the_worst_size_keeps_to_a_limit_that_the_engine_does_not_know(rule: ImageRule) -> None:
    for limit in rule.lower_limits(4):
        size, most = rule.worst_size(limit), rule.worst_units(limit)
        assert 0.97 * most <= rule.units(*size, limit) <= most
        if rule.varies_by_size and rule not in (GRIDS, LONGEST, BUDGET):
            assert rule.units(*size, limit) == rule.units(*size)


def test_the_worst_size_is_as_square_as_may_be() -> None:
    assert TILES.worst_size() == (1792, 1344)
    assert PATCHES.worst_size() == (3584, 3584)
    assert PATCHES.worst_size(842_016) == (1036, 812)  # 5012 x 168 has 4 patches more of 4296
    assert TILES.worst_size(11) == (448 * 11, 448)
    # Above the checkpoint's own limit, as fields of a request allow it.
    assert replace(TILES, client_knobs=True).worst_size(24) == (6 * 448, 4 * 448)


@pytest.mark.parametrize("rule", RULES)
def test_sizes_without_pixels(rule: ImageRule) -> None:
    with pytest.raises(UsageError):
        rule.units(0, 10)
    with pytest.raises(UsageError):
        rule.tokens(10, 0)


@settings(max_examples=part(200, 3))
@given(SIZES, st.integers(1, 12))
def test_tiles_are_those_of_the_limit(size, limit) -> None:
    found = TILES.size_within(size, limit)
    assert TILES.units(*(found or size)) == TILES.units(*size, limit)


@settings(max_examples=part(200, 3))
@given(SIZES, st.integers(100, 16_000))
def test_patches_are_those_of_the_limit(size, windows) -> None:
    limit = windows * 784
    found = PATCHES.size_within(size, limit)
    assert PATCHES.units(*(found or size)) == PATCHES.with_limit(limit).units(*size)


@pytest.mark.parametrize("rule", [SQUARE, PAGES, CROSS])
def test_where_every_image_takes_the_same_no_size_helps(rule: ImageRule) -> None:
    assert not rule.varies_by_size
    assert rule.size_within((4000, 3000), 1) is None


def test_units_of_presets_are_those_of_their_towers() -> None:
    """The account asks the rule for what the tower runs on: both must mean the same tiles."""
    for name in known_presets():
        preset = load_preset(name)
        if preset.image_rule is None or preset.vision is None:
            continue
        vision, rule = preset.vision, preset.image_rule
        values = rule.unit_values(vision.channels, vision.temporal_patch)
        side = vision.image_size if rule.unit_step == 1 else vision.patch_size
        assert values == vision.channels * vision.temporal_patch * (side or 0) ** 2
