"""Parses and formats bytes, times and other numbers for people; groups and bisects values."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from math import isfinite
from typing import Any, Final, TypeVar

from turbofit.core.errors import UsageError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
#: Bytes of one element at 16 bits: float16 (CUDA's half) or bfloat16.
HALF: Final = 2
#: Bytes of one element at 32 bits: a float32 or an int32.
FLOAT: Final = 4
INT: Final = 4

_SUFFIX: Final = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 1000,
    "m": MIB, "mib": MIB, "mb": 1000**2,
    "g": GIB, "gib": GIB, "gb": 1000**3,
    "t": 1 << 40, "tib": 1 << 40, "tb": 1000**4,
}  # fmt: skip
_SECONDS: Final = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_SHARE: Final = re.compile(r"\s*(\d*\.?\d+)\s*%\s*")
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", re.IGNORECASE)
#: Numbers in groups of three digits: ``32,768``, ``1 048 576``. `re` compiles the pattern at its
#: first use.
_GROUPED: Final = r"(?<![\w.,])[1-9]\d{0,2}([, _'\u00a0\u202f])\d{3}(?:\1\d{3})*(?![\d,])"
_LARGEST: Final = 1 << 50
_LONGEST: Final = 24
#: From these values on, ``.3g`` and ``.2g`` round up to a number with an exponent.
_FOUR_DIGITS, _THREE_DIGITS = 999.5, 99.5


def plain_number(text: str) -> str:
    """Remove thousands separators: ``32,768`` becomes ``32768``, but ``1,5`` stays."""
    return re.sub(_GROUPED, lambda digits: "".join(c for c in digits[0] if c.isdigit()), text)


def parse_share(text: str, what: str, below: float = 1.001) -> float | None:
    """Parse ``80%`` as 0.8; return None if the text does not end in ``%``.

    ``what`` names the value in messages.

    Raises:
        UsageError: before the ``%`` is no number, or the share is not less than ``below``.
    """
    if not text.rstrip().endswith("%"):
        return None
    number = _SHARE.fullmatch(text)
    share = float(number[1]) / 100 if number else below
    if share >= below:
        raise UsageError(f"{what} {text!r} is no share of a card", hint="write it as 2%")
    return share


def parse_bytes(text: str, *, what: str = "size") -> int:
    """Parse ``19GiB``, ``19.5 GB``, ``2,780 MiB``, ``512m`` or a plain number of bytes, as bytes.

    A bare ``k``, ``m``, ``g`` or ``t`` is binary, as in ``docker`` and ``java``; ``kB``, ``MB`` and
    ``GB`` are decimal.

    Raises:
        UsageError: the text is no size, or more than 1 PiB; or a number without a unit is below 1
            MiB, too small for a GPU's memory.
    """
    match = _SIZE.fullmatch(plain_number(text))
    value = float(match[1]) * _SUFFIX.get(match[2].lower(), 0) if match else -1
    if not match or match[2].lower() not in _SUFFIX or value > _LARGEST:
        raise UsageError(
            f"{what} {text!r} is not a size", hint="write it as 19GiB, 2780MiB or bytes"
        )
    if not match[2] and 0 < float(match[1]) < MIB:
        raise UsageError(
            f"{what}: {match[1]} bytes?",
            hint=f"memory has a unit: for {match[1]} GiB write {match[1]}GiB, for {match[1]}"
            f" MiB write {match[1]}MiB; where a share is taken write 80%",
        )
    return int(value)


def parse_seconds(text: str, what: str) -> float:
    """Parse ``50ms``, ``2s``, ``1.5h``, ``1h30m`` or a plain number, as seconds.

    Raises:
        UsageError: the text is no time, or the time is not above 0.
    """
    count, unit = r"(\d{1,9}(?:\.\d{1,9})?)\s*", r"(ms|min|s|m|h)\s*"
    if re.fullmatch(rf"\s*{count}", text):
        text += "s"
    whole = re.fullmatch(rf"\s*(?:{count}{unit})+", text)
    parts = re.findall(count + unit, text)
    seconds = sum(float(number) * _SECONDS[name] for number, name in parts)
    if whole is None or seconds <= 0:
        raise UsageError(f"{what} {text!r} is no time", hint="write it as 50ms, 2s, 20m or 1h")
    return seconds


def format_bytes(value: int) -> str:
    """Write bytes with about three digits and a unit: ``20.1 GiB``, ``512 MiB``, ``17.2 KiB``."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(value) >= unit:
            count = value / unit
            return f"{count:.{0 if abs(count) >= 100 else 1}f} {name}"
    return f"{value} B"


def format_duration(seconds: float) -> str:
    """Write a time in seconds, minutes or hours: ``45 s``, ``10 min``, ``1.5 h``."""
    for unit, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"


def mib(value: int) -> str:
    """Write bytes as MiB with one decimal, without the unit, for tables."""
    return f"{value / MIB:,.1f}"


def three_digits(value: float) -> str:
    """Write a number with at least three digits: ``0.857``, ``26.7``, ``1,134``."""
    return f"{value:.3g}" if abs(value) < _FOUR_DIGITS else f"{value:,.0f}"


def two_digits(value: float) -> str:
    """Write a forecast with two digits: ``0.86``, ``2.0``, ``27``, ``1,100``."""
    rounded = float(f"{value:.1e}")
    return f"{rounded:#.2g}".rstrip(".") if abs(rounded) < _THREE_DIGITS else f"{rounded:,.0f}"


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def bisect(good: Callable[[int], bool], low: int, high: int, step: int = 1) -> tuple[int, int]:
    """Return the last good and the first bad number between ``low`` and ``high``.

    With a ``step``, the two returned numbers may be up to ``step`` apart.

    ``low`` counts as good and ``high`` as bad without a test.
    """
    while high - low > step:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low, high


def last_good(value: Callable[[int], float], low: int, high: int) -> int:
    """Return the last number, from ``low`` and below ``high``, whose value is not negative.

    ``low`` counts as good without a test. Values must fall. A number is tried where a line through
    the values of both ends crosses zero, which takes few tries if they fall evenly. If the same end
    moves twice, the middle is tried.
    """
    good, bad, guess, was_good = max(0.0, value(low)) + 1, -1.0, high - 1, None
    while high - low > 1:
        found = value(guess)
        same, was_good = was_good == (found >= 0), found >= 0
        if was_good:
            low, good = guess, found + 1
        else:
            high, bad = guess, found
        part = 0.5 if same else good / (good - bad)
        guess = min(max(low + int((high - low) * part), low + 1), high - 1)
    return low


def number(value: Any) -> int:
    """Convert a client's value, such as an integer, a float or a text, to an integer.

    The result is 0 if the value is no number.
    """
    if isinstance(value, bool):
        return 0
    if isinstance(value, int):
        return value
    if isinstance(value, str) and len(value) <= _LONGEST:
        try:
            value = float(value)
        except ValueError:
            return 0
    return int(value) if isinstance(value, float) and isfinite(value) else 0


def doubled(first: float, times: int, longest: float) -> float:
    """Return a pause of ``first`` seconds, doubled ``times`` times, but at most ``longest``."""
    return min(longest, first * 2.0 ** min(times, 30))


def grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    """Return the values of each key, in the order of ``pairs``; a pair is a key and a value."""
    groups: dict[K, list[V]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups
