"""The settings of a gateway in addition to the plan."""

from __future__ import annotations

from typing import Any, Final

from msgspec import field
from msgspec.structs import replace

from turbofit.core.process.network import DEFAULT_PORT
from turbofit.core.struct import Struct
from turbofit.core.units import KIB
from turbofit.gateway.http.about import MemoryBar
from turbofit.gateway.limits.defaults import Defaults

#: The entry of allowed media domains that means any public host, over https on its own port.
ANY_PUBLIC: Final = "*"


class ConnectionLimits(Struct):
    """Limits of a connection before its API key is checked; see docs/security.md.

    ``header_bytes`` bounds each single header, and the URL in the request line;
    ``all_headers_bytes`` bounds all headers and the URL together. ``unread_seconds``: how long the
    gateway drops what a client still sends after a refusal. ``write_seconds``: how long a client
    may leave its answer unread. Trusted proxies are exempt from ``connections_per_address``.
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
    """Settings of one gateway; times are in seconds.

    If ``api_keys`` is empty, everybody may use the gateway. At most ``at_once`` requests are at the
    engines. ``front_keys`` are the keys of gateways in front of several nodes (fronts); a front
    names the client of each request. A body must be complete within ``body_seconds``, and bring
    ``body_rate`` bytes a second in each ``body_window_seconds``. An engine is probed after
    ``idle_seconds`` without a success, or after ``stall_seconds`` of silence while requests wait
    for its answers (`health.Monitor`). An engine that fails probes gets no more requests after
    ``hung_seconds`` of such silence; infinity leaves this to its supervisor. ``names`` maps each
    name that clients may use to the engines' name of the model or adapter; if empty, every name is
    passed on. ``about`` is what `/health` tells of the plan, ``memory`` the plan's memory as the
    chat page shows it.
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
    hung_seconds: float = 180.0
    retry_seconds: float = 5.0
    probe_seconds: float = 10.0
    drain_seconds: float = 30.0
    pretend: bool = False
    names: dict[str, str] = field(default_factory=dict)
    defaults: Defaults = Defaults()
    about: dict[str, Any] = field(default_factory=dict)
    memory: tuple[MemoryBar, ...] = ()

    def taking_over(self, other: GatewayConfig) -> GatewayConfig:
        """Return this configuration with the keys, origins, hosts and media domains of another."""
        return replace(
            self,
            api_keys=other.api_keys,
            front_keys=other.front_keys,
            allow_origins=other.allow_origins,
            allowed_hosts=other.allowed_hosts,
            allowed_media_domains=other.allowed_media_domains,
        )
