"""What a pretend GPU of a launch held and refused, whichever engine runs on it."""

from __future__ import annotations

from turbofit.core.struct import Struct

__all__ = ["PretendDeath", "PretendUsage"]


class PretendDeath(Struct):
    """The allocation that an engine asked of a pretend GPU and did not get, in bytes.

    ``where`` is the engine's call. ``short`` is by how much the card would have to be larger; None
    where it was large enough and the scenario let the allocation of number ``simulated`` fail.
    """

    gpu: int
    phase: str
    where: str
    requested: int
    left: int
    short: int | None
    simulated: int | None = None


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
