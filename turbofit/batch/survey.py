"""What an input holds, read once before anything is sent: how many items, and a digest of each."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Survey"]

#: Between two looks whether to stop, in items.
_STEP = 1 << 12


class Survey:
    """Four bytes and a bit an item.

    Args:
        digests: of each number, from 1 on; 0 where there is no item.
        tick: called from time to time, with the number so far; what it raises ends the reading.
    """

    def __init__(
        self, digests: Iterable[int], tick: Callable[[int], None] = lambda _: None
    ) -> None:
        self._digests = array("I", [0])
        for number, digest in enumerate(digests, 1):
            self._digests.append(digest)
            if number % _STEP == 0:
                tick(number)
        self._done = bytearray(len(self._digests) // 8 + 1)
        self.total = len(self._digests) - 1 - (self._digests.count(0) - 1)

    def holds(self, number: int, digest: int) -> bool:
        """Whether the input has this item."""
        return 0 < number < len(self._digests) and self._digests[number] == digest

    def done(self, number: int) -> bool:
        """Whether it has its line."""
        return bool(self._done[number >> 3] >> (number & 7) & 1)

    def mark(self, number: int) -> bool:
        """It has its line; false where it had one before."""
        if self.done(number):
            return False
        self._done[number >> 3] |= 1 << (number & 7)
        return True

    def check_order(self) -> None:
        """Whether what is done is the beginning of the input.

        Raises:
            UsageError: an item is done, and one before it is not.
        """
        missing = 0
        for number, digest in enumerate(self._digests):
            if not digest:
                continue
            if not self.done(number):
                missing = missing or number
            elif missing:
                raise UsageError(
                    f"item {number} has its line and item {missing} has none: the output is not in "
                    "order",
                    hint="leave --in-order out, or name another output",
                )
