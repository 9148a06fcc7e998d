"""Where Ray's traffic uses TLS, ours does too, with the same certificates on both ends.

Ray takes them from variables that every node must have (``RAY_USE_TLS`` and three files).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.errors import LaunchError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping

__all__ = ["client_context", "server_context"]

_FILES: Final = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


def server_context(environ: Mapping[str, str]) -> ssl.SSLContext | None:
    """What a node shows and asks of gateways; None where Ray uses no TLS.

    Raises:
        LaunchError: a file is missing or no certificate.
    """
    return _context(environ, server=True)


def client_context(environ: Mapping[str, str]) -> ssl.SSLContext | None:
    """What a gateway shows and asks of nodes; None where Ray uses no TLS.

    A node is whoever has a certificate of Ray's authority: these name no addresses.

    Raises:
        LaunchError: a file is missing or no certificate.
    """
    return _context(environ, server=False)


def _context(environ: Mapping[str, str], *, server: bool) -> ssl.SSLContext | None:
    if environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    certificate, key, authority = (environ.get(name, "") for name in _FILES)
    try:
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(authority)
    except (OSError, ssl.SSLError) as exc:
        raise LaunchError(
            f"RAY_USE_TLS is set, but its certificates cannot be used: {exc}",
            hint=f"check {', '.join(_FILES)} on this node",
        ) from None
    return context
