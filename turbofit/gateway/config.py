"""What a gateway is told beside the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.struct import Struct
from turbofit.core.units import GIB

if TYPE_CHECKING:
    from turbofit.core.plan import Plan
    from turbofit.gateway.limits import Bounds

__all__ = ["GatewayConfig", "host_budget", "host_of_one"]

_LEAST_HOST: Final = 2 * GIB
_UNKNOWN_HOST: Final = 4 * GIB
_MOST_PIXELS_BYTES: Final = 7 * 89_478_485


class GatewayConfig(Struct):
    """Settings of one gateway; times in seconds.

    ``api_keys`` empty means that everybody may. ``host_bytes`` is the host memory of images in
    flight to one engine, see `host_budget`. ``idle_seconds`` and ``stall_seconds`` say when an
    engine is asked for a token, see `health.Monitor`. ``serial``: engines answer one request after
    the other and are asked how they are instead. ``shares`` are the requests that the plan counts
    on at each engine; empty where all take the same. ``pretend`` says in every answer that the
    GPUs are pretend ones.

    A gateway that follows a `roll.Roll` is told ``upstream_key``, ``host_bytes`` and ``shares`` of
    each engine there instead; ``prefix_affinity`` and ``serial`` hold for all of them.
    """

    host: str = "127.0.0.1"
    port: int = 23333
    api_keys: tuple[str, ...] = ()
    upstream_key: str | None = None
    allow_origins: tuple[str, ...] = ()
    allowed_media_domains: tuple[str, ...] = ()
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    host_bytes: int = _UNKNOWN_HOST
    queue_length: int = 256
    queue_seconds: float = 30.0
    body_seconds: float = 120.0
    idle_seconds: float = 60.0
    stall_seconds: float = 120.0
    retry_seconds: float = 5.0
    probe_seconds: float = 30.0
    drain_seconds: float = 30.0
    prefix_affinity: bool = False
    serial: bool = False
    shares: tuple[float, ...] = ()
    pretend: bool = False


def host_of_one(bounds: Bounds) -> int:
    """Host memory of one request at its limits while its images are decoded, in bytes."""
    pixels = _MOST_PIXELS_BYTES * max(1, bounds.limits.images_per_request)
    return pixels + bounds.limits.units_per_request * bounds.bytes_per_unit


def host_budget(plan: Plan, bounds: Bounds) -> int:
    """Host memory that images in flight to one engine may take, in bytes.

    A quarter of what the plan leaves free, shared by the replicas; never less than one request at
    its limits needs, since the plan promises that one.
    """
    one = host_of_one(bounds)
    available = plan.host.available
    if available is None:
        return max(one, _UNKNOWN_HOST)
    free = available - plan.host.pinned - plan.host.pageable
    return max(one, _LEAST_HOST, free // 4 // max(1, plan.parallel.replicas))
