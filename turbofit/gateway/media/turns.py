"""How many pictures are decoded beside each other in the gateway's process."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from turbofit.gateway.media.pictures import LARGEST_PIXELS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

#: Pictures of the largest size whose pixels may be in memory at once, 2 GiB of them.
_LARGEST_AT_ONCE: Final = 2


class PictureTurns:
    """As many pictures at once as there are ``threads``, two at least, fewer where they are large.

    They share the pixels of two of the largest. First come, first served: a large picture is not
    overtaken for ever by small ones.
    """

    def __init__(self, threads: int) -> None:
        self._parts = max(_LARGEST_AT_ONCE, threads)
        self._pixels = -(-_LARGEST_AT_ONCE * LARGEST_PIXELS // self._parts)
        self._free = asyncio.Semaphore(self._parts)
        self._next = asyncio.Lock()

    @asynccontextmanager
    async def of(self, size: tuple[int, int]) -> AsyncIterator[None]:
        """The turn of a picture of so many pixels a side, which ends with the context."""
        taken = 0
        try:
            async with self._next:
                while taken < self._share(size):
                    await self._free.acquire()
                    taken += 1
            yield
        finally:
            for _ in range(taken):
                self._free.release()

    def _share(self, size: tuple[int, int]) -> int:
        """Parts of all pixels that this picture takes."""
        return min(self._parts, max(1, -(-size[0] * size[1] // self._pixels)))
