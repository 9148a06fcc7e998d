"""What a request holds of an engine."""

from __future__ import annotations

from turbofit.core.struct import Struct

__all__ = ["Cost"]


class Cost(Struct):
    """What a request holds of an engine until it lets go."""

    units: int = 0
    host_bytes: int = 0

    @property
    def free(self) -> bool:
        """Whether it holds nothing."""
        return not self.units and not self.host_bytes
