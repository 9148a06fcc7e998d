"""What an engine's actor is told, and what it tells."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from turbofit.core.plan import Plan
from turbofit.core.struct import Struct
from turbofit.gateway.limits.gate import KvCache
from turbofit.launch.serve.config import ClusterServeConfig

__all__ = ["EngineSpec", "EngineState"]


class EngineSpec(Struct):
    """One engine of one node; everything that its actor needs, so that Ray can start it again.

    ``name`` is the engine's for good. ``plan`` is `alone.alone`'s. ``key`` is what the engine's API
    asks for. ``listen`` is the node's address, empty where the gateway is on the node itself.
    ``peers`` are the gateways' addresses. ``config`` is as for one machine; its request is what a
    plan must keep that is made after the engine ran out of memory: the promise to clients. With
    ``config.rehearse`` the node makes the plan again, and rehearses it before the launch.
    """

    name: str
    plan: Plan
    key: str
    listen: str
    peers: tuple[str, ...]
    config: ClusterServeConfig


class EngineState(Struct):
    """Where an engine stands; ``number`` grows with each change.

    ``url`` is where gateways reach it. ``said`` is its last line of progress, ``folder`` its run's
    on the node. ``tokens`` is what its cache holds, ``gate`` the vision units that one of its
    forwards may have, None for any number, with ``kv`` (`gateway.limits.gate.Gate`). ``error`` is
    the document of why it failed.
    """

    number: int = 0
    state: Literal["starting", "ready", "failed", "ended"] = "starting"
    url: str = ""
    said: str = ""
    folder: str = ""
    pid: int = 0
    tokens: int = 0
    gate: int | None = None
    kv: KvCache = KvCache()
    warnings: tuple[str, ...] = ()
    error: dict[str, Any] = msgspec.field(default_factory=dict)
