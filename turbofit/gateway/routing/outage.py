"""No engine will be up for a while: why, and for how long."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from turbofit.gateway.http.refusals import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Outage"]


class Outage:
    """What a supervisor knows of the engines' next start.

    Args:
        reason: one clause for people.
        until: when the first engine is started again, by the clock.
        clock: seconds that only grow.
    """

    def __init__(self, reason: str, until: float, clock: Callable[[], float]) -> None:
        self.reason, self.until, self._clock = reason, until, clock

    @property
    def seconds_left(self) -> int:
        """Whole seconds until the next start, at least 1."""
        return max(1, ceil(self.until - self._clock()))

    @property
    def message(self) -> str:
        """Why, and until when."""
        return f"{self.reason}; the next start is in {self.seconds_left} s"

    def refusal(self) -> Refusal:
        """What clients are told."""
        return Refusal("engine_resting", why=self.message, retry_after=self.seconds_left)
