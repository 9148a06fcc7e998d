"""What a rehearsal saw, as a plan keeps it."""

from __future__ import annotations

from typing import Annotated, Literal

from turbofit.core.struct import Struct, doc

__all__ = ["Death", "Moment", "Rehearsal", "RehearsedCache", "RehearsedCase"]


class RehearsedCase(Struct):
    """One worst case as the engine ran it: bytes per GPU, and pinned host bytes."""

    name: str
    peak: Annotated[
        tuple[int, ...],
        doc(
            "Bytes that the engine had allocated on each GPU at most, without what is "
            "charged beforehand."
        ),
    ]
    transient: Annotated[tuple[int, ...], doc("Bytes of the pool on each GPU at most.")]
    pinned: Annotated[int, doc("Bytes of pinned host memory.")]


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
    asked: Annotated[
        int | None, doc("Bytes that were asked; null where no allocation was refused.")
    ]
    left: Annotated[int | None, doc("Bytes that were left.")]


class Moment(Struct):
    """One phase of a rehearsal: bytes in use on each GPU of its group, at most and at its end.

    What others hold and what was charged beforehand is in both. ``image``: a worst case with
    images ran in it.
    """

    phase: Annotated[str, doc("The engine's phase, or case NAME.")]
    peak: Annotated[
        tuple[int, ...],
        doc("Bytes in use on each GPU of the group at most, others' included."),
    ]
    end: Annotated[tuple[int, ...], doc("Bytes in use on each GPU at the end of the phase.")]
    image: Annotated[bool, doc("Whether images ran in it.")] = False


class Rehearsal(Struct):
    """What the real engine did on pretend GPUs; values and speed are not real.

    ``not_known`` lists what a rehearsal cannot see; it was charged from the forecast.
    ``timeline`` has its phases in order, the last one where it died.
    """

    outcome: Annotated[Literal["served", "out_of_memory", "hang", "failed"], doc("How it ended.")]
    seconds: Annotated[float, doc("Wall time of the rehearsal; never a speed.")]
    engine_version: str
    cases: tuple[RehearsedCase, ...]
    cache: RehearsedCache
    death: Death | None
    not_known: Annotated[tuple[str, ...], doc("What a rehearsal cannot see.")] = ()
    timeline: Annotated[
        tuple[Moment, ...], doc("Its phases in order; the last one where it died.")
    ] = ()
