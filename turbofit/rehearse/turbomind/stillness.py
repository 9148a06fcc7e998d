"""How long something has not changed: on a busy machine a slow engine is not one that hangs."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["PATIENCE", "Stillness"]

#: How many times its limit a case may take as long as the engine works on it.
PATIENCE = 5


class Stillness:
    """Seconds since what is looked at was last another value.

    Args:
        look: the value now.
        clock: seconds.
    """

    def __init__(
        self, look: Callable[[], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._look = look
        self._clock = clock
        self._value = look()
        self._begun = self._moved = clock()

    def seconds(self) -> float:
        """Since the last change, or since the start where there was none."""
        now, value = self._clock(), self._look()
        if value != self._value:
            self._value, self._moved = value, now
        return now - self._moved

    def since_start(self) -> float:
        """Seconds since the start, whatever changed."""
        return self._clock() - self._begun
