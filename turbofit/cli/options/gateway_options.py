"""Options of the public side, which `gateway` and `serve` have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from turbofit.cli.command import option_name
from turbofit.cli.terminal.output import note
from turbofit.core.errors import UsageError
from turbofit.core.process.ports import DEFAULT_PORT, LAST_PORT
from turbofit.core.process.variables import variables
from turbofit.core.validation import FilePath, Metavar, Validated
from turbofit.gateway.limits.defaults import Defaults, JsonArguments, JsonSampling
from turbofit.planning.request import Positive

if TYPE_CHECKING:
    from turbofit.gateway.config import GatewayConfig


class GatewayOptions(Validated):
    """What a person says of the public side, each field an option."""

    host: str = Field(default="127.0.0.1", description="where to listen")
    port: Annotated[int, Field(ge=0, le=LAST_PORT), Metavar("PORT")] = Field(
        default=DEFAULT_PORT, description="where to listen; 0 takes a free one"
    )
    api_key: tuple[Annotated[str, Metavar("KEY", repeatable=True)], ...] = Field(
        default=(),
        description="a key that clients must send (repeatable; default: $TURBOFIT_API_KEY, "
        "or $TURBOFIT_API_KEYS by commas)",
    )
    api_key_file: FilePath | None = Field(
        default=None, description="a file with such keys, one a line"
    )
    front_key_file: FilePath | None = Field(
        default=None,
        description="a file with the key of `turbofit gateway --nodes`: who shows it says whose "
        "each request is",
    )
    no_auth: bool = Field(default=False, description="let everybody in, beyond loopback too")
    allowed_media_domains: tuple[Annotated[str, Metavar("DOMAIN")], ...] = Field(
        default=(),
        description="fetch remote images from these: example.com, *.example.com, example.com:8443",
    )
    allow_origins: tuple[Annotated[str, Metavar("ORIGIN")], ...] = Field(
        default=(),
        description="web pages that may use the server, e.g. https://chat.example.com (default: "
        "none)",
    )
    trusted_proxies: tuple[Annotated[str, Metavar("ADDRESS")], ...] = Field(
        default=(),
        description="reverse proxies whose X-Forwarded-For says who the client is: 10.0.0.7, "
        "10.0.0.0/8",
    )
    connections_per_address: Positive | None = Field(
        default=None,
        description="connections that one address may have, but for trusted proxies (default 1024)",
    )
    ssl_certfile: FilePath | None = Field(
        default=None, description="serve TLS with this certificate"
    )
    ssl_keyfile: FilePath | None = Field(default=None, description="its key")
    access_log: FilePath | None = Field(
        default=None,
        description="a JSON line for each request: a file, - for stderr, or none (default: stderr; "
        "of serve, a file in the run's folder)",
    )
    record_trace: FilePath | None = Field(
        default=None,
        description="a JSON line for each answered request, for `turbofit bench --trace`: when it "
        "came and how large it was, nothing of its text and images",
    )

    default_chat_template_kwargs: JsonArguments | None = Field(
        default=None,
        description="arguments of the chat template for requests that do not give them, e.g. "
        "'{\"enable_thinking\": false}'",
    )
    default_sampling: JsonSampling | None = Field(
        default=None,
        description="temperature, top_p, top_k, min_p, repetition_penalty and max_tokens for "
        "requests that do not give them, e.g. '{\"temperature\": 0.2}'",
    )

    def refuse_unused(self) -> None:
        """Stop where there is no gateway, and what it alone does was asked for.

        Raises:
            UsageError: such an option was given, for example a key that no gateway would ask for.
        """
        usual = {"host": "127.0.0.1", "no_auth": True}
        for name, value in self.given().items():
            if name != "port" and usual.get(name) != value:
                raise UsageError(
                    f"{option_name(name)} is for the gateway, and --no-gateway leaves that out",
                    hint="leave one of the two out; the engines listen on 127.0.0.1, and take keys "
                    "as -- --api-keys KEY",
                )

    def config(self, *, upstream_key: str | None = None) -> GatewayConfig:
        """What the gateway is told.

        Raises:
            UsageError: open to the network by accident, half a certificate, an empty key, or a
                proxy without an address.
        """
        from turbofit.gateway.config import ConnectionLimits, GatewayConfig
        from turbofit.gateway.http.connections import Networks, is_loopback
        from turbofit.gateway.server import check_bind

        if bool(self.ssl_certfile) != bool(self.ssl_keyfile):
            raise UsageError(
                "--ssl-certfile and --ssl-keyfile go together", hint="give both, or neither"
            )
        if not all(key.strip() for key in self.api_key):
            raise UsageError("an --api-key is empty", hint="leave it out, or give a key")
        Networks(self.trusted_proxies)  # which says what is none before anything is started
        keys = (*self.api_key, *_keys_in(self.api_key_file)) or variables().keys
        of_one = self.connections_per_address
        config = GatewayConfig(
            host=self.host,
            port=self.port,
            api_keys=tuple(key.strip() for key in keys if key.strip()),
            front_keys=_keys_in(self.front_key_file),
            upstream_key=upstream_key,
            allow_origins=self.allow_origins,
            allowed_media_domains=self.allowed_media_domains,
            trusted_proxies=self.trusted_proxies,
            connection=ConnectionLimits(
                **({} if of_one is None else {"connections_per_address": of_one})
            ),
            ssl_certfile=self.ssl_certfile,
            ssl_keyfile=self.ssl_keyfile,
            record_trace=self.record_trace,
            defaults=Defaults(
                template=self.default_chat_template_kwargs or {},
                sampling=self.default_sampling or {},
            ),
        )
        check_bind(config, no_auth=self.no_auth)
        if not config.ssl_certfile and not is_loopback(config.host):
            note("warning: without --ssl-certfile, keys and prompts cross the network in clear")
        return config


def _keys_in(file: str | None) -> tuple[str, ...]:
    """The keys in a file.

    Raises:
        UsageError: it cannot be read, or there is none in it.
    """
    if file is None:
        return ()
    try:
        with open(file, encoding="ascii") as keys:
            found = tuple(line.strip() for line in keys if line.strip())
    except (OSError, ValueError) as exc:
        raise UsageError(
            f"{file} cannot be read: {exc}", hint="give a file with a key a line"
        ) from None
    if not found:
        raise UsageError(f"there is no key in {file}", hint="write a key a line into it")
    return found
