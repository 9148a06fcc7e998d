from __future__ import annotations

import pytest

from turbofit.gateway.limits.grammars import pattern_weight


@pytest.mark.parametrize(
    ("pattern", "weight", "loops"),
    [
        ("", 0, 0),
        ("abc", 3, 0),
        ("a{3}", 3, 0),
        ("a{2,5}", 5, 0),
        ("a{2,}", 2, 0),
        ("[a-z]{1,100}", 1600, 0),
        (r"[^\]a]x", 161, 0),
        (".{10}", 1600, 0),
        (r"\d\S\\", 16 + 160 + 1, 0),
        ("(ab){10}", 30, 0),
        ("(a{10}){10}", 110, 0),
        ("a?b*c+", 3, 3),
        ("(a?){40}", 80, 40),
        ("((a?){4}){5}", 45, 20),
        ("(a", 1, 0),
        ("a)", 2, 0),
        ("[a", 17, 0),
        ("{x}", 3, 0),
    ],
)
def test_weight_and_loops(pattern, weight, loops) -> None:
    assert pattern_weight(pattern, 10**6) == (weight, loops)


def test_counting_ends_past_the_limit() -> None:
    assert pattern_weight("(a{1000}){1000}" * 1000, 5000)[0] < 10**9
    assert pattern_weight("a{99999999999999999999}", 5000)[0] > 5000
