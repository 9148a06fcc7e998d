"""Which names have come before, in 8 bytes a name and no more than 24."""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import Final

__all__ = ["SeenNames"]

_FIRST: Final = 1 << 10


class SeenNames:
    """An open hash table of 64-bit digests, doubled when two thirds of it are full.

    Over: in a million names, two that differ are taken for one with a probability of 3e-8.
    """

    def __init__(self) -> None:
        self._slots, self._count = array("Q", bytes(8 * _FIRST)), 0

    def add(self, name: str) -> bool:
        """Whether this name is new."""
        data = name.encode(errors="surrogatepass")
        digest = int.from_bytes(blake2b(data, digest_size=8).digest(), "little") or 1
        at = _slot(self._slots, digest)
        if self._slots[at] == digest:
            return False
        self._slots[at] = digest
        self._count += 1
        if 3 * self._count > 2 * len(self._slots):
            self._grow()
        return True

    def _grow(self) -> None:
        larger = array("Q", bytes(16 * len(self._slots)))
        for digest in self._slots:
            if digest:
                larger[_slot(larger, digest)] = digest
        self._slots = larger


def _slot(slots: array[int], digest: int) -> int:
    """Where a digest stands, or would stand."""
    last = len(slots) - 1
    at = digest & last
    while slots[at] and slots[at] != digest:
        at = (at + 1) & last
    return at
