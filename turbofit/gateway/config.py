"""What a gateway is told beside the plan."""

from __future__ import annotations

from typing import Any

from msgspec import field
from msgspec.structs import replace

from turbofit.core.process.ports import DEFAULT_PORT
from turbofit.core.struct import Struct
from turbofit.core.units import KIB
from turbofit.gateway.http.welcome import MemoryBar
from turbofit.gateway.limits.defaults import Defaults


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

    ``api_keys`` empty means that everybody may. No more requests than ``at_once`` are at the
    engines. ``front_keys`` are of gateways in front of several nodes, which say whose each request
    is. A body must be whole within ``body_seconds``, and bring
    ``body_rate`` bytes a second in each ``body_window_seconds``. ``idle_seconds``,
    ``stall_seconds`` and ``stuck_seconds`` say when an engine is asked for a token, and how it is,
    see `health.Monitor`; ``hung_seconds`` when one that owes answers and brings nothing is taken
    out, infinity where its supervisor says. ``denied`` is the file of who is refused, since engines
    died of them; without one nothing outlives the gateway. ``names`` is what the engines call the
    model, by each name that clients may give, those of adapters among them; empty where every name
    is passed on.
    ``about`` is what `/health` tells of the plan, ``memory`` what the page shows of it.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    api_keys: tuple[str, ...] = ()
    front_keys: tuple[str, ...] = ()
    upstream_key: str | None = None
    allow_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_media_domains: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    connection: ConnectionLimits = ConnectionLimits()
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    at_once: int | None = None
    queue_length: int = 256
    queue_seconds: float = 30.0
    body_seconds: float = 300.0
    body_window_seconds: float = 15.0
    body_rate: int = 16 * KIB
    idle_seconds: float = 60.0
    stall_seconds: float = 15.0
    stuck_seconds: float = 120.0
    hung_seconds: float = 180.0
    retry_seconds: float = 5.0
    probe_seconds: float = 10.0
    drain_seconds: float = 30.0
    pretend: bool = False
    denied: str | None = None
    record_trace: str | None = None
    names: dict[str, str] = field(default_factory=dict)
    defaults: Defaults = Defaults()
    about: dict[str, Any] = field(default_factory=dict)
    memory: tuple[MemoryBar, ...] = ()

    def taking_over(self, other: GatewayConfig) -> GatewayConfig:
        """The same with another's keys, origins, hosts and media domains, which may change."""
        return replace(
            self,
            api_keys=other.api_keys,
            front_keys=other.front_keys,
            allow_origins=other.allow_origins,
            allowed_hosts=other.allowed_hosts,
            allowed_media_domains=other.allowed_media_domains,
        )
