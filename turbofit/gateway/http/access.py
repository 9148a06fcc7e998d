"""Who may use a gateway: the host names that it answers to, API keys, and origins of web pages."""

from __future__ import annotations

import hmac
import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Final

from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http.connections import ip_address, is_loopback
from turbofit.gateway.http.refusals import Refusal

#: The most characters of a host or origin that a refusal repeats.
_SHOWN: Final = 80
#: The form of a header ``Host``: an IPv6 address in brackets, a name or an IPv4 address; a port.
_HOST: Final = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]*))(?::\d*)?")
#: A name of one label.
_LABEL: Final = re.compile(r"[a-z0-9_-]{1,63}")
#: Suffixes of names that nobody outside can own, beside ``.internal``, which is always accepted.
_PRIVATE: Final = (".local", ".lan", ".home.arpa", ".svc", ".test")
#: Files with the names of this machine, and the domains in which it looks names up.
_NAME_FILES: Final = (Path("/etc/hosts"), Path("/etc/resolv.conf"))
#: The form of a list of header names, separated by commas.
_NAMES: Final = re.compile(rb"[A-Za-z0-9_-]{1,64}(?:, ?[A-Za-z0-9_-]{1,64}){0,63}")

_ID_SHOWN: Final = 8


class Hosts:
    """The host names under which a server without a key answers; every IP address is accepted, too.

    A web page can let its own name lead to its visitor's loopback or network (DNS rebinding). Then
    the browser takes this server for the page's own server. So the page's requests have no
    ``Origin``, and have the page's name as ``Host``. Names under ``internal`` are accepted, since
    ICANN delegates this domain to nobody; a container calls its host ``host.docker.internal``.

    With neither a key nor ``allowed_hosts``, a server that other machines reach answers programs
    under every name. But it shows the pages that tell of its use only under names that nobody
    outside can own. Beside the names above, these are names of one label, as services of Compose
    and Kubernetes have, and names under private suffixes. If ``allowed_hosts`` are given, the
    server answers under its own names and these alone, also if it has keys; ``*`` allows all names.
    """

    def __init__(self, config: GatewayConfig) -> None:
        allowed = {name.lower().rstrip(".") for name in config.allowed_hosts}
        self._keyed = bool(config.api_key or config.front_keys)
        self._any = "*" in allowed or (self._keyed and not allowed)
        #: Whether everybody in a network may use the server.
        self._open = not (self._keyed or allowed or is_loopback(config.host))
        self._names = {config.host.lower(), *_own_names(), *allowed}

    def check(self, headers: Mapping[bytes, bytes], *, tells_of_use: bool = False) -> None:
        """Refuse a request whose ``Host`` is no name of this server; HTTP/1.0 may have no ``Host``.

        ``tells_of_use``: the answer tells of the server and of its use.

        Raises:
            Refusal: the ``Host`` is not accepted.
        """
        host = headers.get(b"host")
        if self._any or host is None or (self._open and not tells_of_use):
            return
        name = _name_of(host)
        if not self._knows(name):
            raise Refusal("host", name=name[:_SHOWN])

    def _knows(self, name: str) -> bool:
        """Return whether a name belongs to this server, or cannot belong to a web page."""
        if self._open and (_LABEL.fullmatch(name) or name.endswith(_PRIVATE)):
            return True
        private = name.endswith((".localhost", ".internal"))
        return name in self._names or private or ip_address(name) is not None

    def comes_from_page(self, headers: Mapping[bytes, bytes]) -> bool:
        """Return whether a request with an ``Origin`` comes from this server's own page.

        After DNS rebinding, the requests of a foreign page have the page's name as ``Host``, too.
        So without a key, the ``Host`` must also be a name of this server.
        """
        host = headers.get(b"host", b"")
        if headers[b"origin"].partition(b"://")[2].lower() != host.lower() or not host:
            return False
        return self._keyed or self._knows(_name_of(host))


def _own_names() -> set[str]:
    """Return the names of this machine, by its own files: a name server is not asked."""
    host = socket.gethostname().lower()
    names = {"localhost", host}
    for path in _NAME_FILES:
        with suppress(OSError, UnicodeDecodeError):
            for line in path.read_text(encoding="utf-8").lower().splitlines():
                first, *words = line.partition("#")[0].split() or [""]
                if first in ("search", "domain"):
                    names.update(f"{host}.{domain.strip('.')}" for domain in words)
                elif host in words:
                    names.update(words)
    return names


def _name_of(host: bytes) -> str:
    """Return the name in a ``Host`` header without its port; the whole text if it is malformed."""
    text = host.decode("latin-1").lower()
    parts = _HOST.fullmatch(text)
    return (parts[1] or parts[2]).rstrip(".") if parts else text


class Keys:
    """API keys, compared in constant time and kept only as hashes.

    Without keys everybody may use the server. ``fronts`` are the keys of fronts; a front names the
    client of each request.
    """

    def __init__(self, keys: Sequence[str], fronts: Sequence[str] = ()) -> None:
        #: Hashes of all keys; the fronts' keys are first.
        self._hashes = [sha256(key.encode()).digest() for key in (*fronts, *keys) if key]
        self._fronts = sum(map(bool, fronts))

    def check(self, headers: Mapping[bytes, bytes]) -> tuple[str, bool]:
        """Check a request's key; return the client's id, and whether the key belongs to a front.

        The id is the beginning of the key's hash; it is empty if no keys are set.

        Raises:
            Refusal: keys are set, and the request has no valid key.
        """
        if not self._hashes:
            return "", False
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        key = given.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        mine = sha256(key).digest()
        # All keys are compared, so that the time does not reveal a similar key.
        equal = [hmac.compare_digest(mine, known) for known in self._hashes]
        if not any(equal):
            raise Refusal("unauthorized")
        return mine.hex()[:_ID_SHOWN], any(equal[: self._fronts])


class Origins:
    """Origins of web pages that may use the server: ``https://chat.example.com``, or ``*`` for all.

    A page can send requests to a server on its visitor's own machine. Only browsers send the header
    ``Origin``; an origin that is not allowed is refused. The server's own page, under the names of
    ``hosts``, is always allowed.
    """

    def __init__(self, allowed: Sequence[str], hosts: Hosts) -> None:
        self._any, self._allowed = "*" in allowed, frozenset(o.rstrip("/") for o in allowed)
        self._hosts = hosts

    def check(self, headers: Mapping[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
        """Return response headers that let a browser give the answer to the web page.

        The result is empty if the request has no origin, or comes from the server's own page.

        Raises:
            Refusal: the page's origin is not allowed.
        """
        origin = headers.get(b"origin")
        if origin is None:
            return ()
        page = origin.decode("latin-1")
        if not self._any and page not in self._allowed:
            if self._hosts.comes_from_page(headers):
                return ()
            raise Refusal("origin", page=page[:_SHOWN])
        value = b"*" if self._any else origin
        return (
            (b"access-control-allow-origin", value),
            (b"access-control-expose-headers", b"x-request-id, x-turbofit-limited, retry-after"),
            (b"vary", b"Origin"),
        )

    def preflight(self, headers: Mapping[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
        """Return response headers for a browser's preflight request.

        Raises:
            Refusal: the page is not allowed, or the request names no page.
        """
        allowed = self.check(headers)
        if not allowed:
            raise Refusal("method_not_allowed:options")
        wanted = headers.get(b"access-control-request-headers", b"")
        return (
            *allowed,
            (b"access-control-allow-methods", b"GET, POST"),
            # A page may send any header, since SDKs have headers of their own (x-stainless-os).
            # The gateway does not pass unknown headers on.
            (b"access-control-allow-headers", wanted if _NAMES.fullmatch(wanted) else b""),
            (b"access-control-max-age", b"600"),
        )
