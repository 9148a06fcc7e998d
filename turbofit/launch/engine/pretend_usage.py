"""What a pretend GPU of a launch held, whichever engine runs on it."""

from __future__ import annotations

from turbofit.core.struct import Struct

__all__ = ["PretendUsage"]


class PretendUsage(Struct):
    """What one pretend GPU held, in bytes: at most, now, and its executor pool at most.

    ``pool`` in the steps by which a pool takes memory, as the plan counts it; None for an engine
    without such a pool.
    """

    gpu: int
    peak: int
    held: int
    pool: int | None
    free_at_cache: int | None
    region: int | None
