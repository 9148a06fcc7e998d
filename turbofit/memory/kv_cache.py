"""How an engine cuts its KV cache, as it is planned and as a log tells."""

from __future__ import annotations

from typing import NamedTuple

from turbofit.core.struct import Struct
from turbofit.core.units import round_up


class CacheShape(Struct):
    """How one rank's cache is cut under given settings; sizes are bytes.

    Blocks of one size, each of ``block_tokens`` tokens, of which ``reserved`` are no request's. The
    driver holds whole multiples of ``step``. Where the region is cut into pages, the first begins
    at the next multiple of ``page``.
    """

    block_bytes: int
    block_tokens: int
    step: int
    page: int = 1
    reserved: int = 0

    def held(self, region: int) -> int:
        """Bytes that the driver holds for a region of so many."""
        return round_up(region, self.step)

    def tokens(self, region: int) -> int:
        """KV tokens that requests can have in a region of so many bytes, at least."""
        return max(0, region // self.block_bytes - self.reserved) * self.block_tokens


class LoggedSlab(NamedTuple):
    """A line of an engine's log about its cache: bytes of a slab, and of each object in it.

    ``each``: objects of one sequence, where it is of their states; blocks come first.
    """

    slab_bytes: int
    object_bytes: int
    each: int = 1
