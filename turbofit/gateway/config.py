"""What a gateway is told beside the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from msgspec import field
from msgspec.structs import replace

from turbofit.core.process.ports import DEFAULT_PORT
from turbofit.core.struct import Struct
from turbofit.core.units import GIB, KIB
from turbofit.gateway.limits.defaults import Defaults
from turbofit.gateway.media.pictures import BYTES_OF_PIXEL, LARGEST_PIXELS

if TYPE_CHECKING:
    from turbofit.core.plan import Plan
    from turbofit.gateway.limits.request_limits import Bounds

_LEAST_HOST: Final = 2 * GIB
_UNKNOWN_HOST: Final = 4 * GIB


class ConnectionLimits(Struct):
    """What a connection may take before anybody has looked at its key; see docs/security.md.

    ``header_bytes`` bounds one header and the address in the request line, ``all_headers_bytes``
    both together. ``unread_seconds``: how long the gateway reads on, and throws away, what a client
    still sends after its refusal. ``write_seconds``: how long a client may take nothing of its
    answer. ``connections_per_address`` does not hold for trusted proxies.
    """

    header_bytes: int = 16 * KIB
    all_headers_bytes: int = 64 * KIB
    headers: int = 100
    headers_seconds: float = 20.0
    keep_alive_seconds: int = 65
    unread_seconds: float = 10.0
    write_seconds: float = 120.0
    connections: int = 4096
    connections_per_address: int = 1024


class GatewayConfig(Struct):
    """Settings of one gateway; times in seconds.

    ``api_keys`` empty means that everybody may. ``front_keys`` are of gateways in front of several
    nodes, which say whose each request is. A body must be whole within ``body_seconds``, and bring
    ``body_rate`` bytes a second in each ``body_window_seconds``. ``host_bytes`` is the host memory
    of images in flight to one engine, see `host_budget`. ``idle_seconds``, ``stall_seconds`` and
    ``stuck_seconds`` say when an engine is asked for a token, and how it is, see `health.Monitor`.
    ``serial``: engines answer one request after the other and are asked how they are instead.
    ``shares`` are the requests that the plan counts on at each engine; empty where all take the
    same. ``denied`` is the file of who is refused, since engines died of them; without one nothing
    outlives the gateway. ``names`` is what the engines call the model, by each name that clients
    may give, those of adapters among them; empty where every name is passed on. ``about`` is what
    `/health` tells of the plan.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    api_keys: tuple[str, ...] = ()
    front_keys: tuple[str, ...] = ()
    upstream_key: str | None = None
    allow_origins: tuple[str, ...] = ()
    allowed_media_domains: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    connection: ConnectionLimits = ConnectionLimits()
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    host_bytes: int = _UNKNOWN_HOST
    queue_length: int = 256
    queue_seconds: float = 30.0
    body_seconds: float = 300.0
    body_window_seconds: float = 15.0
    body_rate: int = 16 * KIB
    idle_seconds: float = 60.0
    stall_seconds: float = 120.0
    stuck_seconds: float = 120.0
    retry_seconds: float = 5.0
    probe_seconds: float = 30.0
    drain_seconds: float = 30.0
    prefix_affinity: bool = False
    serial: bool = False
    shares: tuple[float, ...] = ()
    pretend: bool = False
    denied: str | None = None
    record_trace: str | None = None
    names: dict[str, str] = field(default_factory=dict)
    defaults: Defaults = Defaults()
    about: dict[str, Any] = field(default_factory=dict)

    def taking_over(self, other: GatewayConfig) -> GatewayConfig:
        """The same with another's keys, origins and media domains, which may change at any time."""
        return replace(
            self,
            api_keys=other.api_keys,
            front_keys=other.front_keys,
            allow_origins=other.allow_origins,
            allowed_media_domains=other.allowed_media_domains,
        )


def host_budget(plan: Plan, bounds: Bounds) -> int:
    """Host memory that images in flight to one engine may take, in bytes.

    A quarter of what the plan leaves free, shared by the replicas; never less than one request at
    its limits needs, since the plan promises that one.
    """
    decoded = LARGEST_PIXELS * BYTES_OF_PIXEL * max(1, bounds.limits.images_per_request)
    least = decoded + bounds.limits.units_per_request * bounds.bytes_per_unit
    available = plan.host.available
    if available is None:
        return max(least, _UNKNOWN_HOST)
    free = available - plan.host.pinned - plan.host.pageable
    return max(least, _LEAST_HOST, free // 4 // max(1, plan.parallel.replicas))
