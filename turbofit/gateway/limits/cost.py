"""What a request holds of an engine."""

from __future__ import annotations

from typing import Final

from turbofit.core.struct import Struct

__all__ = ["UNSTATED", "Cost"]

#: Tokens of a request that may grow as long as the engine lets it.
UNSTATED: Final = 1 << 62


class Cost(Struct, eq=False):
    """What one request holds of an engine until it lets go; equal to itself alone.

    ``units`` and ``host_bytes`` are those of all its ``copies``, ``tokens`` the most that one of
    them can hold of the KV cache.
    """

    units: int = 0
    host_bytes: int = 0
    tokens: int = 0
    copies: int = 1

    @property
    def light(self) -> bool:
        """Whether it has no images."""
        return not self.units and not self.host_bytes
