"""Which names have come before, in 12 to 24 bytes a name, taken at once."""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import Final

__all__ = ["SeenNames"]

_LEAST_BITS: Final = 10


class SeenNames:
    """An open hash table of 64-bit digests, a third to two thirds of which are taken at the end.

    Over: in a million names, two that differ are taken for one with a probability of 3e-8.

    Args:
        names: how many there are at most.
    """

    def __init__(self, names: int) -> None:
        self._last = (1 << max(_LEAST_BITS, (names + names // 2).bit_length())) - 1
        self._slots = array("Q", bytes(8)) * (self._last + 1)

    def add(self, name: str) -> bool:
        """Whether this name is new."""
        data = name.encode(errors="surrogatepass")
        digest = int.from_bytes(blake2b(data, digest_size=8).digest(), "little") or 1
        at = digest & self._last
        while self._slots[at] and self._slots[at] != digest:
            at = (at + 1) & self._last
        new = not self._slots[at]
        self._slots[at] = digest
        return new
