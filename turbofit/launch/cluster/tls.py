"""Where Ray's traffic uses TLS, that between fronts and nodes does, with the same certificates.

Ray takes them from variables that every node must have (``RAY_USE_TLS`` and three files).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.errors import LaunchError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping

__all__ = ["client_context", "server_words"]

#: The authority; the certificate and its key beside it.
_AUTHORITY: Final = "RAY_TLS_CA_CERT"
_FILES: Final = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", _AUTHORITY)


def server_words(environ: Mapping[str, str]) -> tuple[str, ...]:
    """With what a node's `turbofit serve` shows Ray's certificate; none where Ray uses no TLS.

    It asks fronts for none: they show the node's key.
    """
    if not _used(environ):
        return ()
    certificate, key, _ = (environ.get(name, "") for name in _FILES)
    return ("--ssl-certfile", certificate, "--ssl-keyfile", key)


def client_context(environ: Mapping[str, str]) -> ssl.SSLContext | None:
    """By what a front knows nodes; None where Ray uses no TLS.

    A node has a certificate of Ray's authority that names its address, as Ray itself demands.
    """
    if not _used(environ):
        return None
    import ssl

    try:
        return ssl.create_default_context(cafile=environ.get(_AUTHORITY, ""))
    except OSError as exc:
        raise LaunchError(
            f"RAY_USE_TLS is set, but the certificate of its authority cannot be used: {exc}",
            hint=f"check {_AUTHORITY} on this node",
        ) from None


def _used(environ: Mapping[str, str]) -> bool:
    return environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
