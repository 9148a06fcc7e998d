"""Makes a gateway's configuration from its options: reads keys, and checks who may connect."""

from __future__ import annotations

from typing import Final

from turbofit.core.errors import UsageError
from turbofit.core.process.variables import SERVER_KEYS, keys_in
from turbofit.gateway.config import ANY_PUBLIC, ConnectionLimits, GatewayConfig, GatewayOptions
from turbofit.gateway.http.connections import Networks, is_loopback
from turbofit.gateway.media.addresses import private_networks

#: What a client sends beside its key.
_HEADER: Final = b"Authorization: Bearer \r\n"


def configured(options: GatewayOptions, *, upstream_key: str | None = None) -> GatewayConfig:
    """Return the configuration of a gateway: its options, its keys, and its allowed media domains.

    Raises:
        UsageError: options contradict each other, or a file of keys cannot be read.
    """
    if bool(options.ssl_certfile) != bool(options.ssl_keyfile):
        raise UsageError(
            "--ssl-certfile and --ssl-keyfile go together", hint="give both, or neither"
        )
    if not all(key.strip() for key in options.api_key):
        raise UsageError("an --api-key is empty", hint="leave it out, or give a key")
    Networks(options.trusted_proxies)  # raises for a bad address, before anything starts
    _check_media_networks(options)
    keys = (*options.api_key, *_keys_in(options.api_key_file)) or keys_in(SERVER_KEYS)
    keys = tuple(key.strip() for key in keys if key.strip())
    front_keys = _keys_in(options.front_key_file)
    for key in (*keys, *front_keys):
        _check_key(key)
    found = {
        "api_key": keys,
        "front_keys": front_keys,
        "allowed_media_domains": _media_domains(options, keyed=bool(keys or front_keys)),
        "upstream_key": upstream_key,
    }
    config = GatewayConfig.of(**{**options.given(), **found})
    check_bind(config)
    return config


def check_bind(config: GatewayConfig) -> None:
    """Refuse an address beyond the loopback if no key is set and ``no_auth`` is not given.

    Raises:
        UsageError: others could reach the engines without a key.
    """
    if config.api_key or config.front_keys or config.no_auth or is_loopback(config.host):
        return
    raise UsageError(
        f"--host {config.host} is reachable from other machines and no key is set",
        hint="give --api-key, or --no-auth if everybody may use the server",
    )


def _check_key(key: str) -> None:
    """Refuse a key that no header can carry: nobody could use the server.

    Raises:
        UsageError: the key is too long, or has a line's end in it.
    """
    most = ConnectionLimits().header_bytes - len(_HEADER)
    if len(key.encode()) > most or any(sign in key for sign in "\r\n\0"):
        raise UsageError(
            f"no client could send a key of {len(key):,} characters: a header carries {most:,} of"
            " them at most, in one line",
            hint="give a shorter key, such as the output of openssl rand -hex 32",
        )


def _media_domains(options: GatewayOptions, *, keyed: bool) -> tuple[str, ...]:
    """Return the domains from which remote images may come; ``keyed``: clients need a key.

    By default all public hosts are allowed. But if other machines reach the server without a key,
    no host is allowed, since a stranger could make the server fetch files.
    """
    given = tuple(domain.lower() for domain in options.allowed_media_domains)
    if "none" in given:
        if len(given) > 1:
            raise UsageError(
                "--allowed-media-domains has none and other domains",
                hint="give only none, or only domains",
            )
        return ()
    alone = is_loopback(options.host) and not options.trusted_proxies
    return given or ((ANY_PUBLIC,) if keyed or alone else ())


def _check_media_networks(options: GatewayOptions) -> None:
    """Check the private networks, which count only for hosts that a person names.

    With ``*`` alone, whoever owns a domain could lead the server to any address of the networks.

    Raises:
        UsageError: a network is not private, or no host is named.
    """
    if private_networks(options.allowed_media_networks) and not (
        {*options.allowed_media_domains} - {ANY_PUBLIC, "none"}
    ):
        raise UsageError(
            "--allowed-media-networks counts only for hosts that --allowed-media-domains names",
            hint="name the hosts, as --allowed-media-domains minio.lan:9000",
        )


def _keys_in(file: str | None) -> tuple[str, ...]:
    if file is None:
        return ()
    try:
        with open(file, encoding="ascii") as lines:
            keys = tuple(line.strip() for line in lines if line.strip())
    except (OSError, ValueError) as exc:
        raise UsageError(
            f"{file} cannot be read: {exc}", hint="give a text file with one key on each line"
        ) from None
    if not keys:
        raise UsageError(f"{file} has no key", hint="write one key on each line")
    return keys
