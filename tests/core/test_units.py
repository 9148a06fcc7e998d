"""Sizes as people write them."""

from __future__ import annotations

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.units import (
    GIB,
    MIB,
    grouped,
    last_good,
    parse_bytes,
    parse_seconds,
    three_digits,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("19GiB", 19 * GIB), ("512m", 512 * MIB), ("2GB", 2 * 10**9), ("1.5k", 1536),
        ("0", 0), ("19B", 19), ("1048576", MIB), ("2915041280", 2915041280),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["0.5", "1", "19", "1048575"])
def test_a_forgotten_unit_is_asked_for(text: str) -> None:
    with pytest.raises(UsageError, match=rf"^--margin: {text} bytes\?") as caught:
        parse_bytes(text, what="--margin")
    for unit in ("GiB", "MiB"):
        assert f"for {text} {unit} write {text}{unit}" in caught.value.hint


@pytest.mark.parametrize("text", ["lots", "", "-1", "1 XiB", "9999999TiB", "9" * 400])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.85714, "0.857"), (26.71, "26.7"), (999.4, "999"), (999.5, "1,000"),
        (1133.7, "1,134"), (242_176, "242,176"),
    ],
)  # fmt: skip
def test_no_number_for_people_has_an_exponent(value: float, text: str) -> None:
    assert three_digits(value) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1.5s", 1.5), ("20m", 1200), ("2h", 7200), ("3min", 180), ("1h 30m", 5400)],
)
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text, "x") == seconds


@pytest.mark.parametrize("text", ["", "0s", "1h30", "1d", "s", "-1s", "9" * 200 + "x"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError, match="is no time"):
        parse_seconds(text, "x")


def test_keys_and_values_keep_the_order_of_the_pairs():
    pairs = [("b", 2), ("a", 1), ("b", 1), ("b", 2)]

    assert list(grouped(pairs).items()) == [("b", [2, 1, 2]), ("a", [1])]


def test_no_pairs_make_no_group():
    assert grouped([]) == {}


@pytest.mark.parametrize("bend", [0.0, 1e-6, 0.3, 1e6])
@pytest.mark.parametrize("crossing", [0, 1, 2, 17, 500, 998, 999])
def test_the_last_good_number_is_found_in_few_tries(crossing: int, bend: float) -> None:
    tried: list[int] = []

    def value(number: int) -> float:
        tried.append(number)
        left = crossing - number
        return left if left >= 0 else left - bend * left**2

    assert last_good(value, 0, 1000) == crossing
    assert len(tried) <= (8 if bend < 0.1 else 30), tried
