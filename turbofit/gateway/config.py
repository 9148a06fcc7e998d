"""The settings of a gateway: options that a person gives, and values that the program sets."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import Field

from turbofit.core.errors import UsageError, option_of
from turbofit.core.process.network import DEFAULT_PORT, LAST_PORT
from turbofit.core.struct import Struct
from turbofit.core.units import KIB
from turbofit.core.validation import FilePath, Metavar, Positive, Validated
from turbofit.gateway.http.about import MemoryBar
from turbofit.gateway.limits.defaults import Defaults, JsonArguments, JsonSampling

#: The entry of ``allowed_media_domains`` for every public host, by https on port 443.
ANY_PUBLIC: Final = "*"
#: Options that can change while a gateway serves.
LIVE: Final = (
    "api_key", "allow_origins", "allowed_hosts", "allowed_media_domains", "allowed_media_networks",
)  # fmt: skip


class ConnectionLimits(Struct):
    """Limits of a connection before its API key is checked; see docs/security.md.

    ``header_bytes`` bounds each single header, and the URL in the request line;
    ``all_headers_bytes`` bounds all headers and the URL together. After a refusal the gateway reads
    and drops the rest of the request for ``unread_seconds``. A client may leave its answer unread
    for ``write_seconds``. Trusted proxies are exempt from ``connections_per_address``.
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


class GatewayOptions(Validated):
    """The options of the gateway, as a person gives them to the commands `gateway` and `serve`.

    `options.configured` makes a `GatewayConfig` of the options.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=LAST_PORT), Metavar("PORT")] = DEFAULT_PORT
    api_key: tuple[Annotated[str, Metavar("KEY", repeatable=True)], ...] = ()
    api_key_file: FilePath | None = None
    front_key_file: FilePath | None = None
    no_auth: bool = False
    allowed_media_domains: tuple[Annotated[str, Metavar("DOMAIN")], ...] = ()
    allowed_media_networks: tuple[Annotated[str, Metavar("NETWORK")], ...] = ()
    allow_origins: tuple[Annotated[str, Metavar("ORIGIN")], ...] = ()
    allowed_hosts: tuple[Annotated[str, Metavar("NAME")], ...] = ()
    trusted_proxies: tuple[Annotated[str, Metavar("ADDRESS")], ...] = ()
    max_concurrent_requests: Positive | None = None
    ssl_certfile: FilePath | None = None
    ssl_keyfile: FilePath | None = None
    access_log: FilePath | None = None

    default_chat_template_kwargs: JsonArguments | None = None
    default_sampling: JsonSampling | None = None

    def refuse_unused(self) -> None:
        """Refuse options that only a gateway uses, such as a key, if there is no gateway.

        Raises:
            UsageError: such an option is given.
        """
        usual = {"host": "127.0.0.1", "no_auth": True}
        for name, value in self.given().items():
            if name != "port" and usual.get(name) != value:
                raise UsageError(
                    f"{option_of(name)} is for the gateway, and --no-gateway starts no gateway",
                    hint="leave one of the two out; without a gateway the engines listen on "
                    "127.0.0.1, and -- --api-keys KEY gives the engines a key",
                )


class GatewayConfig(GatewayOptions):
    """Settings of one gateway; times are in seconds.

    - If ``api_key`` is empty, everybody may use the gateway. ``front_keys`` are the keys of fronts;
      a front names the client of each request.
    - A body must be complete within ``body_seconds``. In each ``body_window_seconds`` the client
      must send ``body_rate`` bytes a second.
    - An engine is probed after ``idle_seconds`` without a success, or after ``stall_seconds`` of
      silence while requests wait for its answers (`health.Monitor`). After ``hung_seconds`` of
      silence and failed probes, the engine gets no more requests. If ``hung_seconds`` is infinite,
      only the supervisor of the engine gives up a silent engine.
    - ``names`` maps each name that clients may use to the engines' name of the model or adapter. If
      ``names`` is empty, every name is passed on.
    - ``about`` is the part of `/health` that describes the plan. ``memory`` is the plan's memory
      for the chat page.
    - ``cores`` is the number of cores that this process may use.
    """

    front_keys: tuple[str, ...] = ()
    upstream_key: str | None = None
    connection: ConnectionLimits = ConnectionLimits()
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
    names: dict[str, str] = Field(default_factory=dict)
    about: dict[str, Any] = Field(default_factory=dict)
    memory: tuple[MemoryBar, ...] = ()
    cores: int = 1

    @property
    def defaults(self) -> Defaults:
        return Defaults(
            template=self.default_chat_template_kwargs or {}, sampling=self.default_sampling or {}
        )

    def taking_over(self, other: GatewayConfig) -> GatewayConfig:
        """Return this configuration with the `LIVE` options and the fronts' keys of ``other``."""
        return self.changed(**{name: getattr(other, name) for name in (*LIVE, "front_keys")})
