"""How long a process has done nothing: on a busy machine a slow engine is not one that hangs."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["LIMITS_WHILE_ACTIVE", "InactivityTimer"]

#: How many times its limit a case may take as long as the engine works on it.
LIMITS_WHILE_ACTIVE = 5


class InactivityTimer:
    """Seconds since a value was last another one.

    Args:
        look: gives the value now, such as a count of calls.
        clock: seconds.
    """

    def __init__(
        self, look: Callable[[], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._look = look
        self._clock = clock
        self._value = look()
        self._started = self._changed = clock()

    def inactive(self) -> float:
        """Seconds since the last change, or since the start where there was none."""
        now, value = self._clock(), self._look()
        if value != self._value:
            self._value, self._changed = value, now
        return now - self._changed

    def elapsed(self) -> float:
        """Seconds since the start, whatever changed."""
        return self._clock() - self._started
