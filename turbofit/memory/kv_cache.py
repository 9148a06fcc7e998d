"""The layout of an engine's KV cache, as a plan or a log describes it."""

from __future__ import annotations

from typing import NamedTuple

from turbofit.core.struct import Struct
from turbofit.core.units import round_up


class CacheShape(Struct):
    """The layout of one rank's cache with given settings; sizes in bytes.

    All blocks have one size and ``block_tokens`` tokens; requests never get ``reserved`` of them.
    The driver allocates whole multiples of ``step``. If the region is divided into pages, the first
    begins at the next multiple of ``page``.
    """

    block_bytes: int
    block_tokens: int
    step: int
    page: int = 1
    reserved: int = 0

    def held(self, region: int) -> int:
        """Bytes that the driver allocates for a region of ``region`` bytes."""
        return round_up(region, self.step)

    def tokens(self, region: int) -> int:
        """The least number of KV tokens for requests in a region of ``region`` bytes."""
        return max(0, region // self.block_bytes - self.reserved) * self.block_tokens


class LoggedSlab(NamedTuple):
    """A log line about the engine's cache: bytes of a slab, and of each object in it.

    ``each`` is the number of objects for one sequence if they hold states; blocks come first.
    """

    slab_bytes: int
    object_bytes: int
    each: int = 1
