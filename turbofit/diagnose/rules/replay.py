"""A GPU's memory, allocation by allocation, from the moment when the cache is sized.

Drivers hand out pools in steps and keep a pool's largest size; that is all that is modelled, so a
real driver may want a little more.
"""

from __future__ import annotations

from typing import NamedTuple

from turbofit.core.struct import Struct
from turbofit.core.units import round_up
from turbofit.memory.account import PAGE


class PoolOperation(NamedTuple):
    """``size`` bytes into a pool; negative gives back, ``pool`` "" is an allocation by itself."""

    pool: str
    size: int
    what: str


class Shortfall(Struct):
    """The allocation that failed: what it was for, its size, and bytes that were missing for it."""

    what: str
    requested: int
    left: int
    short: int


class Replay:
    """Bytes held in each pool against what was free.

    Args:
        free: bytes free when the cache was sized.
        step: the granularity of pools.
        live: bytes alive in pools at that moment, whose rounded sizes are already not free.
        peak: bytes that were alive in such a pool besides, and that it still holds.
    """

    def __init__(
        self,
        free: int,
        step: int,
        live: dict[str, int] | None = None,
        peak: dict[str, int] | None = None,
    ) -> None:
        self.left = free
        self._step = step
        self._live = dict(live or {})
        self._held_bytes = {
            pool: round_up(size + (peak or {}).get(pool, 0), step)
            for pool, size in self._live.items()
        }

    def do(self, op: PoolOperation) -> Shortfall | None:
        """Do one allocation; where it fails, nothing changes."""
        if not op.pool:
            size = round_up(op.size, PAGE)
            if size > self.left:
                return Shortfall(
                    what=op.what, requested=op.size, left=self.left, short=size - self.left
                )
            self.left -= size
            return None
        live = self._live.get(op.pool, 0) + op.size
        held = self._held_bytes.get(op.pool, 0)
        growth = max(0, round_up(live, self._step) - held)
        if op.size > 0 and growth > self.left:
            return Shortfall(
                what=op.what, requested=op.size, left=self.left, short=growth - self.left
            )
        self._live[op.pool] = live
        self._held_bytes[op.pool] = held + growth
        self.left -= growth
        return None

    def trim(self, pool: str) -> None:
        """Give back what a pool holds and does not use."""
        wanted = round_up(self._live.get(pool, 0), self._step)
        self.left += self._held_bytes.get(pool, 0) - wanted
        self._held_bytes[pool] = wanted

    def room(self, pool: str) -> int:
        """The largest size to which a pool can grow."""
        return self._held_bytes.get(pool, 0) + self.left
