"""LLaVA's grids: units and tokens of images that fill their grid, or lie in its middle."""

from __future__ import annotations

import pytest

from tests.core.images.rules import GRIDS


@pytest.mark.parametrize(
    ("size", "limit", "units", "tokens"),
    [
        ((672, 672), None, 5, 576 + 48 * 49),
        ((672, 336), None, 3, 576 + 24 * 49),
        ((672, 400), None, 5, 576 + 28 * 49),  # 10 rows of padding above, 10 below
        ((672, 672), 2, 3, 576 + 24 * 25),
        ((672, 672), 1, 2, 576 + 24 * 25),
    ],
)
def test_a_grid_is_chosen_and_padding_has_no_tokens(size, limit, units, tokens) -> None:
    assert (GRIDS.units(*size, limit), GRIDS.tokens(*size, limit)) == (units, tokens)
