"""Why no engine could ever hold a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.gateway.http.refusals import Refusal

if TYPE_CHECKING:
    from collections.abc import Collection

    from turbofit.gateway.limits.cost import Cost
    from turbofit.gateway.limits.gate import EngineCapacity

__all__ = ["impossible"]


def impossible(sizes: Collection[EngineCapacity], cost: Cost) -> Refusal | None:
    """What to say of a request that fits no engine, even where it has no other; None where it fits.

    Args:
        sizes: of the engines.
        cost: the request's.
    """
    if any(size.holds(cost) for size in sizes):
        return None
    wide = [size for size in sizes if size.units is None or cost.units <= size.units]
    if not wide:
        widest = max(size.units for size in sizes if size.units is not None)
        return Refusal("units_over_limit", units=cost.units, widest=widest)
    most = max(size.host_bytes for size in wide if size.host_bytes is not None)
    return Refusal("images_over_limit", size=cost.host_bytes, most=most)
