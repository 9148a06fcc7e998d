"""What holds for every image rule, and what for each."""

from __future__ import annotations

from itertools import pairwise
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
from turbofit.core.struct import decode, to_json
from turbofit.gateway.limits.request_limits import KNOBS
from turbofit.model.presets import known_presets, load_preset

TILES = TileRule(tile_size=448, tokens_per_tile=256, max_dynamic_patch=12, client_knobs=False)
ASKED = replace(TILES, client_knobs=True)
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
    TILES, ASKED, PATCHES, replace(PATCHES, client_knobs=False), SQUARE,
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
    fields = {name for rule in RULES for name in rule.knobs(1)}
    assert fields <= set(KNOBS), "the gateway's table of such fields"


@pytest.mark.parametrize("rule", RULES)
def test_limits_and_units_agree(rule: ImageRule) -> None:
    assert rule.lower_limits()[0] <= rule.checkpoint_limit <= rule.exposed_limit
    assert decode(to_json(rule), AnyImageRule, what="rule") == rule
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
    if rule in (SQUARE, PAGES, CROSS):  # every image takes the same, and no size helps
        assert not rule.varies_by_size
        assert rule.size_within((4000, 3000), 1) is None


@pytest.mark.parametrize("rule", RULES)
def test_the_worst_size_keeps_to_a_limit_that_the_engine_does_not_know(rule: ImageRule) -> None:
    for limit in rule.lower_limits(4):
        size, most = rule.worst_size(limit), rule.worst_units(limit)
        assert 0.97 * most <= rule.units(*size, limit) <= most
        if rule.varies_by_size and rule not in (GRIDS, LONGEST, BUDGET):
            assert rule.units(*size, limit) == rule.units(*size)


def test_the_worst_size_is_as_square_as_may_be() -> None:
    assert (TILES.worst_size(), PATCHES.worst_size()) == ((1792, 1344), (3584, 3584))
    assert PATCHES.worst_size(842_016) == (1036, 812)  # 5012 x 168 has 4 patches more of 4296
    assert TILES.worst_size(11) == (448 * 11, 448)
    assert [PATCHES.grid(units) for units in (1, 18, 4 * 131)] == [
        [1, 2, 2],
        [1, 4, 4],
        [1, 2, 262],
    ]
    # Above the checkpoint's own limit, as fields of a request allow it.
    assert ASKED.worst_size(24) == (6 * 448, 4 * 448)


@pytest.mark.parametrize("rule", RULES)
def test_sizes_without_pixels_and_hostile_limits_are_refused(rule: ImageRule) -> None:
    for call in (
        lambda: rule.units(0, 10),
        lambda: rule.tokens(10, 0),
        lambda: ASKED.units(10, 10, 10**9),
        lambda: ASKED.worst_units(10**9),
        lambda: PATCHES.units(10, 10, 0),
    ):
        with pytest.raises(UsageError):
            call()


@settings(max_examples=part(200, 5))
@given(SIZES, st.integers(1, 12), st.integers(100, 16_000))
def test_a_size_within_a_limit_takes_what_the_limit_gives(size, tiles, windows) -> None:
    resized = TILES.size_within(size, tiles)
    assert TILES.units(*(resized or size)) == TILES.units(*size, tiles)
    limit = windows * 784
    resized = PATCHES.size_within(size, limit)
    assert PATCHES.units(*(resized or size)) == PATCHES.with_limit(limit).units(*size)


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


side = st.integers(1, 6000)


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


def test_what_a_client_can_ask_for():
    assert (TILES.exposed_limit, ASKED.exposed_limit) == (12, 24)
    assert ASKED.worst_units(ASKED.exposed_limit) == 25
    assert PATCHES.exposed_limit == 12_845_056
    down = PATCHES.lower_limits()
    assert all(high > low and low % 784 == 0 for high, low in pairwise(down))
    assert down[-1] >= PATCHES.min_pixels
    assert PATCHES.limits_below(10_000) == range(3136, 10_000, 784)


@pytest.mark.parametrize("thumbnail", [True, False])
def test_an_image_of_so_many_units_can_be_made(thumbnail):
    rule = replace(ASKED, max_dynamic_patch=40, thumbnail=thumbnail)
    for units in set(range(1, 40)) - ({2} if rule.thumbnail else set()):
        image = rule.image_of(units)
        assert rule.with_limit(image.knobs["max_dynamic_patch"]).units(*image.size) == units
    for limit in (*range(14), 24, 40, 128):  # the worst is reached
        sizes = [(1, max(limit, 1)), (448, 448 * max(limit, 1))]
        assert rule.worst_units(limit) == max(rule.units(*size, limit) for size in sizes)


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
