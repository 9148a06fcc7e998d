"""Idefics3's rule: bounds that no image passes."""

from __future__ import annotations

import pytest

from turbofit.core.images import LongestEdgeRule


@pytest.mark.parametrize("tile_size", [364, 365])
@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_no_image_passes_the_worst(tile_size: int, side: int) -> None:
    rule = LongestEdgeRule(tile_size=tile_size, tokens_per_tile=169, max_dynamic_patch=side**2)
    sizes = [(rule.unit_side + i, rule.unit_side + j) for i in range(-3, 4) for j in range(-3, 4)]
    sizes += [(1, 1), (640, 480), (480, 640), (1, 50)]
    for width, height in sizes:
        units = rule.units(width, height)
        assert units <= rule.worst_units()
        assert rule.tokens(width, height) <= rule.unit_tokens(units)
    assert rule.units(*rule.worst_size()) == rule.worst_units()


def test_an_odd_side_needs_a_row_more() -> None:
    """The preprocessor adds a pixel to the shorter side of 365 x 365, and so a row of tiles."""
    odd = LongestEdgeRule(tile_size=365, tokens_per_tile=169, max_dynamic_patch=9)
    assert odd.worst_units() == 4 * 3 + 1
    even = LongestEdgeRule(tile_size=364, tokens_per_tile=169, max_dynamic_patch=9)
    assert even.worst_units() == 3 * 3 + 1
