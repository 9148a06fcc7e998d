"""Kimi-K2.5's image rule: what its preprocessor makes of sizes, and the most it can make."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sweep import part
from turbofit.core.images import NavitRule
from turbofit.core.plan import Limits
from turbofit.gateway.overlay import edits

PUBLISHED = NavitRule(patch_size=14, merge=2, max_pixels=16384 * 14**2)


def small(side: int, budget: int) -> NavitRule:
    return NavitRule(patch_size=14, merge=2, max_pixels=budget * 14**2, side=side)


def test_the_worst_is_more_than_the_budget():
    assert PUBLISHED.worst_units() == 17_856
    assert PUBLISHED.units(*PUBLISHED.worst_size()) == 17_856
    assert PUBLISHED.tokens(*PUBLISHED.worst_size()) == 4464


pixels = st.integers(1, 24 * 14) | st.integers(1, 4000)


@pytest.mark.parametrize(("side", "budget"), [(4, 3), (8, 5), (12, 40), (12, 72), (16, 200)])
def test_the_worst_is_attained(side, budget):
    """Of every number of patches, with nothing and with most of one over."""
    rule = small(side, budget)
    edges = [count * 14 + over for count in range(2 * side) for over in (1, 6, 12, 13)]
    most = max(rule.units(width, height) for width in edges for height in edges)
    assert most <= rule.worst_units() == rule.units(*rule.worst_size())


@settings(max_examples=part(200, 3))
@given(pixels, pixels, st.integers(2, 40))
def test_a_resized_image_takes_what_a_lower_limit_gives(width, height, share):
    limit = PUBLISHED.max_pixels // share
    found = PUBLISHED.stretched((width, height), limit)
    assert PUBLISHED.units(*found) == PUBLISHED.units(width, height, limit)


def test_the_folder_is_told_within_its_own_section(tmp_path):
    kept = {"auto_map": {"AutoProcessor": "a.B"}, "media_proc_cfg": {"patch_size": 14}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kept))
    limits = Limits(
        vision_unit="patch", max_dynamic_patch=None, max_pixels_per_image=4096 * 14**2,
        images_per_request=1, units_per_image=4096, units_per_request=4096,
        units_per_forward=4096, image_tokens_per_request=1024, n=1, bytes_per_image=1,
        bytes_per_body=1,
    )  # fmt: skip
    changed = edits(tmp_path, PUBLISHED, limits)
    assert changed == {
        "preprocessor_config.json": {
            **kept, "media_proc_cfg": {"patch_size": 14, "in_patch_limit": 4096}
        }
    }  # fmt: skip
