"""What a plan with the least footprint leaves for others."""

from __future__ import annotations

from typing import Annotated

from turbofit.core.struct import Struct, doc

__all__ = ["Footprint"]


class Footprint(Struct):
    """What the engines take at the most, and what their GPUs hold beside them."""

    taken: Annotated[
        tuple[int, ...],
        doc("Bytes that the engines hold at the most on each GPU, in the order of the ledgers."),
    ]
    left: Annotated[int, doc("Bytes for others on the fullest GPU, beyond the margin.")]
    servers: Annotated[
        int | None,
        doc("Engines like these that the same GPUs hold, these included; null: not computed."),
    ]
