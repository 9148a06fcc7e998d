"""What a client writes beside an image."""

from __future__ import annotations

from math import isfinite
from typing import Any, Final

__all__ = ["number"]

_LONGEST: Final = 24


def number(value: Any) -> int:
    """A client's value read generously, 0 where it is no number."""
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
