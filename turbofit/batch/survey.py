"""What an input holds, read once before anything is sent, and what of it has its line."""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.batch.item import ItemError
from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from turbofit.batch.item import BatchItem

__all__ = ["SeenNames", "Survey", "pending"]

#: Between two looks whether to stop, in items.
_STEP: Final = 1 << 12
_LEAST_BITS: Final = 10


class Survey:
    """How many items there are, a digest of each and whether it has its line: 4 bytes and a bit.

    Args:
        items: all of the input.
        tick: called from time to time; what it raises ends the reading.
    """

    def __init__(self, items: Iterable[BatchItem], tick: Callable[[], None] = lambda: None) -> None:
        #: By the item's number; 0 where there is none, as for an empty line.
        self._digests = array("I", [0])
        self.total = 0
        for item in items:
            self._digests.extend([0] * (item.number - len(self._digests)))
            self._digests.append(item.digest)
            self.total += 1
            if self.total % _STEP == 0:
                tick()
        self._done = bytearray(len(self._digests) // 8 + 1)

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
            if digest and not self.done(number):
                missing = missing or number
            elif digest and missing:
                raise UsageError(
                    f"item {number} has its line and item {missing} has none: the output is not in "
                    "order",
                    hint="leave --in-order out, or name another output",
                )


class SeenNames:
    """An open hash table of 64-bit digests, a third to two thirds of which are taken at the end.

    It takes 12 to 24 bytes a name, at once. Over: in a million names, two that differ are taken for
    one with a probability of 3e-8.

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


def pending(items: Iterator[BatchItem], survey: Survey) -> Iterator[BatchItem | None]:
    """Items that have no line yet; None for each that has one.

    Raises:
        UsageError: the input is not what it was when it was read first.
    """
    seen, count = SeenNames(survey.total), 0
    for item in items:
        count += 1
        if not survey.holds(item.number, item.digest):
            raise _changed(f"at item {item.number}")
        if item.custom_id is not None and not seen.add(item.custom_id) and item.fault is None:
            fault = ItemError("duplicate_custom_id", "an item before this one has the same name")
            item = replace(item, fault=fault)  # noqa: PLW2901 - the same item with its fault
        yield None if survey.done(item.number) else item
    if count != survey.total:
        raise _changed(f"it had {survey.total:,} items and has {count:,}")


def _changed(how: str) -> UsageError:
    return UsageError(
        f"the input has changed while it was read, {how}",
        hint="give the same command again once nobody writes it",
    )
