"""Options of the gateway; each field is an option of the commands `gateway` and `serve`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from turbofit.core.errors import UsageError, option_of
from turbofit.core.process.network import DEFAULT_PORT, LAST_PORT
from turbofit.core.process.variables import variables
from turbofit.core.validation import FilePath, Metavar, Validated
from turbofit.gateway.config import ANY_PUBLIC, GatewayConfig
from turbofit.gateway.limits.defaults import Defaults, JsonArguments, JsonSampling
from turbofit.planning.request import Positive


class GatewayOptions(Validated):
    """The options of the gateway, as a person gives them."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=LAST_PORT), Metavar("PORT")] = DEFAULT_PORT
    api_key: tuple[Annotated[str, Metavar("KEY", repeatable=True)], ...] = ()
    api_key_file: FilePath | None = None
    front_key_file: FilePath | None = None
    no_auth: bool = False
    allowed_media_domains: tuple[Annotated[str, Metavar("DOMAIN")], ...] = ()
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
                    f"{option_of(name)} is for the gateway, and --no-gateway leaves that out",
                    hint="leave one of the two out; the engines listen on 127.0.0.1, and take keys "
                    "as -- --api-keys KEY",
                )

    def config(self, *, upstream_key: str | None = None) -> GatewayConfig:
        """Make the gateway's configuration from these options.

        Raises:
            UsageError: options contradict each other, or a file of keys cannot be read.
        """
        from turbofit.gateway.http.connections import Networks
        from turbofit.gateway.server import check_bind

        if bool(self.ssl_certfile) != bool(self.ssl_keyfile):
            raise UsageError(
                "--ssl-certfile and --ssl-keyfile go together", hint="give both, or neither"
            )
        if not all(key.strip() for key in self.api_key):
            raise UsageError("an --api-key is empty", hint="leave it out, or give a key")
        Networks(self.trusted_proxies)  # it raises for a bad address before anything starts
        keys = (*self.api_key, *_keys_in(self.api_key_file)) or variables().keys
        keys = tuple(key.strip() for key in keys if key.strip())
        front_keys = _keys_in(self.front_key_file)
        config = GatewayConfig(
            host=self.host,
            port=self.port,
            api_keys=keys,
            front_keys=front_keys,
            upstream_key=upstream_key,
            allow_origins=self.allow_origins,
            allowed_hosts=self.allowed_hosts,
            allowed_media_domains=self._media_domains(bool(keys or front_keys)),
            trusted_proxies=self.trusted_proxies,
            at_once=self.max_concurrent_requests,
            ssl_certfile=self.ssl_certfile,
            ssl_keyfile=self.ssl_keyfile,
            defaults=Defaults(
                template=self.default_chat_template_kwargs or {},
                sampling=self.default_sampling or {},
            ),
        )
        check_bind(config, no_auth=self.no_auth)
        return config

    def _media_domains(self, keyed: bool) -> tuple[str, ...]:
        """Return the domains from which remote images may come; ``keyed``: clients need a key.

        By default all public hosts are allowed. But if others reach the server without a key, none
        is allowed: a stranger could make the server fetch files.
        """
        given = tuple(domain.lower() for domain in self.allowed_media_domains)
        if "none" in given:
            if len(given) > 1:
                raise UsageError(
                    "--allowed-media-domains none stands beside others",
                    hint="give none alone, or the domains",
                )
            return ()
        from turbofit.gateway.http.connections import is_loopback

        alone = is_loopback(self.host) and not self.trusted_proxies
        return given or ((ANY_PUBLIC,) if keyed or alone else ())


def _keys_in(file: str | None) -> tuple[str, ...]:
    if file is None:
        return ()
    try:
        with open(file, encoding="ascii") as lines:
            keys = tuple(line.strip() for line in lines if line.strip())
    except (OSError, ValueError) as exc:
        raise UsageError(
            f"{file} cannot be read: {exc}", hint="give a file with a key a line"
        ) from None
    if not keys:
        raise UsageError(f"there is no key in {file}", hint="write a key a line into it")
    return keys
