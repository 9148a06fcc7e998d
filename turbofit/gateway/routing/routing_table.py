"""Which engines a gateway sends to, and what it holds requests to: replaced as a whole, any time.

A gateway over several machines is told the whole of it again whenever something changes; engines
are known by their names, so that telling the same twice changes nothing.
"""

from __future__ import annotations

from turbofit.core.struct import Struct
from turbofit.gateway.limits.gate import KvCache
from turbofit.gateway.limits.request_limits import Bounds

__all__ = ["Member", "RoutingTable"]


class Member(Struct):
    """One engine.

    ``name`` is its own for good: an engine that is started again has it again, another never.
    ``key`` is its API key. ``share`` are its requests beside the others' shares. ``gate`` are the
    vision units that one of its forwards may have, None for any number, and ``kv`` is its cache,
    see `limits.gate.Gate`; ``host_bytes`` is the host memory of images in flight. ``draining``:
    what it has may end there, and nothing new goes to it.
    """

    name: str
    url: str
    key: str | None = None
    share: float = 1.0
    gate: int | None = None
    kv: KvCache = KvCache()
    host_bytes: int = 0
    draining: bool = False


class RoutingTable(Struct):
    """Everything that a gateway over several machines is told; ``number`` grows with each change.

    ``gateways`` is how many gateways send to these engines: each takes that part of every limit
    which is an engine's rather than a request's.
    """

    number: int
    bounds: Bounds
    members: tuple[Member, ...]
    gateways: int = 1
