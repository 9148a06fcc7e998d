"""How long an answer may take: ``ttft=2s,tpot=50ms``. 90 % of the requests must keep it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from turbofit.core.tuning import SpeedFigures

__all__ = ["LIMITS", "meets", "parse_seconds", "parse_slo"]

#: The times that can be limited, and the figure that is held to each.
LIMITS: Final = {"ttft": "ttft_p90", "tpot": "tpot_p90", "e2e": "e2e_p90"}
_UNITS: Final = {"ms": 1e-3, "": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
#: Of a hundred requests so many may fail where there is no other limit.
_FAILING: Final = 0.01


def parse_seconds(text: str, what: str) -> float:
    """``50ms``, ``2s``, ``20m``, ``1h`` or a number of seconds.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(ms|s|m|min|h)?\s*", text)
    seconds = float(found[1]) * _UNITS[found[2] or ""] if found else 0.0
    if seconds <= 0:
        raise UsageError(f"{what} {text!r} is no time", hint="write it as 50ms, 2s, 20m or 1h")
    return seconds


def parse_slo(text: str) -> dict[str, float]:
    """Seconds by what ``--slo`` limits.

    Raises:
        UsageError: an entry is none, or stands twice.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, sign, value = part.strip().partition("=")
        if not sign or name not in LIMITS or name in found:
            raise UsageError(
                f"--slo {part.strip()!r} is no limit, or stands twice",
                hint="write it as ttft=2s,tpot=50ms,e2e=20s",
            )
        found[name] = parse_seconds(value, f"--slo {name}")
    return found


def meets(figures: SpeedFigures, slo: Mapping[str, float]) -> bool:
    """Whether what was measured keeps the limits, and nearly all was answered."""
    every = figures.answered + figures.failed
    if not figures.answered or figures.failed > _FAILING * every:
        return False
    return all(getattr(figures, LIMITS[name]) <= limit for name, limit in slo.items())
