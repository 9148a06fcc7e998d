"""Llama 4's canvases: the one that enlarges least, else the one that shrinks least."""

from __future__ import annotations

import pytest

from tests.core.images.rules import CANVAS


@pytest.mark.parametrize(
    ("size", "limit", "units"),
    [
        ((100, 100), 16, 1),
        ((336, 336), 16, 1),
        ((337, 336), 16, 3),
        ((672, 672), 16, 5),
        ((5000, 5000), 16, 17),
        ((5000, 5000), 3, 1),
    ],
)
def test_a_canvas_holds_the_image_or_shrinks_it_least(size, limit, units) -> None:
    assert CANVAS.units(*size, limit) == units
