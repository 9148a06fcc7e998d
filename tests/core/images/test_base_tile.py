"""What a client's image is lowered to, and what the client is told."""

from __future__ import annotations

import pytest

from tests.core.images.rules import ASKED
from turbofit.core.images.rule import Allowed, Lowered


@pytest.mark.parametrize(
    ("asked", "to", "limit", "units", "changes"),
    [
        ({"max_dynamic_patch": 24}, Allowed(6, 6, 7, None), 6, 7, (("max_dynamic_patch", 24, 6),)),
        ({"detail": "high"}, Allowed(6, 6, 7, None), 6, 7, (("detail", "high", 6),)),
        ({}, Allowed(12, 12, 5, None), 4, 5, (("max_dynamic_patch", 12, 4),)),
        ({"max_dynamic_patch": 4}, Allowed(6, 6, 7, None), 4, 5, ()),
        ({}, Allowed(6, 6, 7, 1), 1, 1, (("max_dynamic_patch", 6, 1),)),
    ],
)
def test_an_image_is_lowered_to_what_is_allowed(asked, to, limit, units, changes) -> None:
    assert ASKED.lower((1344, 896), asked, to) == Lowered(
        {"max_dynamic_patch": limit}, units, changes
    )
