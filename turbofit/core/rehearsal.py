"""What a rehearsal saw, as a plan keeps it."""

from __future__ import annotations

from typing import Literal

from turbofit.core.struct import Struct

__all__ = ["Death", "Moment", "Rehearsal", "RehearsedCache", "RehearsedCase"]


class RehearsedCase(Struct):
    """One worst case as the engine ran it: bytes per GPU, and pinned host bytes."""

    name: str
    peak: tuple[int, ...]
    transient: tuple[int, ...]
    pinned: int


class RehearsedCache(Struct):
    """The cache as the engine cut it; ``free`` and ``region`` per GPU, None where not reached."""

    free: tuple[int | None, ...]
    region: tuple[int | None, ...]
    object_size: int | None
    slab_size: int | None
    tokens: int | None


class Death(Struct):
    """How it ended: the phase, the engine's call, the bytes asked and left."""

    phase: str
    where: str
    asked: int | None
    left: int | None


class Moment(Struct):
    """One phase of a rehearsal: bytes in use on each GPU of its group, at most and at its end.

    What others hold and what was charged beforehand is in both. ``image``: a worst case with
    images ran in it.
    """

    phase: str
    peak: tuple[int, ...]
    end: tuple[int, ...]
    image: bool = False


class Rehearsal(Struct):
    """What the real engine did on pretend GPUs; values and speed are not real.

    ``not_known`` lists what a rehearsal cannot see; it was charged from the forecast.
    ``timeline`` has its phases in order, the last one where it died.
    """

    outcome: Literal["served", "out_of_memory", "hang", "failed"]
    seconds: float
    engine_version: str
    cases: tuple[RehearsedCase, ...]
    cache: RehearsedCache
    death: Death | None
    not_known: tuple[str, ...] = ()
    timeline: tuple[Moment, ...] = ()
