"""The results of a rehearsal, as a plan contains them."""

from __future__ import annotations

from typing import Annotated, Literal

from turbofit.core.engine_end import End
from turbofit.core.struct import Struct, doc


class RehearsedCase(Struct):
    """One worst case as the engine ran it: bytes per GPU, and pinned host bytes."""

    name: str
    peak: Annotated[tuple[int, ...], doc("Bytes that the engine itself had at most on each GPU.")]
    transient: Annotated[tuple[int, ...], doc("Bytes of the pool on each GPU at most.")]
    pinned: Annotated[int, doc("Bytes of pinned host memory.")]


class RehearsedCache(Struct):
    """The cache as the engine cut it; ``free`` and ``region`` per GPU, None where not reached."""

    free: tuple[int | None, ...]
    region: tuple[int | None, ...]
    object_size: int | None
    slab_size: int | None
    tokens: int | None


class RehearsedTogether(Struct):
    """Terms of the ledger that one counter of the engine tells together; figures per GPU."""

    line: Annotated[str, doc("Their common name, such as weights.")]
    terms: Annotated[tuple[str, ...], doc("The terms of the ledger.")]
    bytes: Annotated[tuple[int, ...], doc("Their bytes in the forecast, together.")]
    rehearsed: Annotated[tuple[int | None, ...], doc("Bytes that the engine took for them.")]


class Moment(Struct):
    """One phase of a rehearsal: bytes in use on each GPU of its group, others' included."""

    phase: Annotated[str, doc("The engine's phase, or case NAME.")]
    peak: Annotated[tuple[int, ...], doc("Bytes at most.")]
    end: Annotated[tuple[int, ...], doc("Bytes at the end of the phase.")]
    image: Annotated[bool, doc("Whether images ran in it.")] = False


class Rehearsal(Struct):
    """What the real engine did on pretend GPUs; values and speed are not real.

    What is ``not_known`` was charged from the forecast.
    """

    outcome: Annotated[Literal["served", "out_of_memory", "hang", "failed"], doc("How it ended.")]
    seconds: Annotated[float, doc("Wall time of the rehearsal; never a speed.")]
    engine_version: str
    cases: tuple[RehearsedCase, ...]
    cache: RehearsedCache
    death: End | None
    not_known: Annotated[tuple[str, ...], doc("What a rehearsal cannot see.")] = ()
    timeline: Annotated[tuple[Moment, ...], doc("Its phases in order, to its end.")] = ()
    together: tuple[RehearsedTogether, ...] = ()
