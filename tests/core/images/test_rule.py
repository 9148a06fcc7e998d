"""What holds for every image rule."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.images.rules import (
    ASKED,
    BUDGET,
    CROSS,
    GRIDS,
    LONGEST,
    PAGES,
    PATCHES,
    RULES,
    SQUARE,
    TILES,
)
from tests.sweep import part
from turbofit.core.errors import UsageError
from turbofit.core.images import (
    AnyImageRule,
    ImageRule,
)
from turbofit.core.promise import Limits
from turbofit.core.struct import decode, to_json
from turbofit.gateway.limits.request_limits import KNOBS
from turbofit.model.presets import known_presets, load_preset

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


def test_what_a_client_can_ask_for():
    assert (TILES.exposed_limit, ASKED.exposed_limit) == (12, 24)
    assert ASKED.worst_units(ASKED.exposed_limit) == 25
    assert PATCHES.exposed_limit == 12_845_056
    down = PATCHES.lower_limits()
    assert all(high > low and low % 784 == 0 for high, low in pairwise(down))
    assert down[-1] >= PATCHES.min_pixels
    assert PATCHES.limits_below(10_000) == range(3136, 10_000, 784)
