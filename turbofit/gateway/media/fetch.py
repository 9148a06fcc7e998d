"""Fetches remote images and videos, each only once and only from allowed domains.

An address is checked when it is resolved, and the connection goes to exactly this address; the name
is not resolved again.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult, urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from turbofit.gateway.config import ANY_PUBLIC
from turbofit.gateway.http.refusals import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_REDIRECTS: Final = 3
_SECONDS: Final = 10.0
_AT_ONCE: Final = 16
_PORTS: Final = {"http": 80, "https": 443}
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
#: Networks that Python's tables call global: NAT64 for local use (RFC 8215), Azure's host, which
#: hands out a machine's certificates, and the IETF's own, which has Oracle's metadata.
_INNER: Final = tuple(
    map(ipaddress.ip_network, ("64:ff9b:1::/48", "168.63.129.16/32", "192.0.0.0/24"))
)
_LONGEST_URL: Final = 4096
_CHUNK: Final = 1 << 16


def is_public(address: str) -> bool:
    """Return whether an IP address is public; an address embedded in it must be public, too."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    if any(ip in network for network in _INNER):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def allowed_host(host: str, port: int, scheme: str, allowed: Sequence[str]) -> bool:
    """Return whether a URL's host, in lower case without a final dot, is allowed.

    An entry ``*.example.com`` allows each name below that domain. An entry ``*`` allows any host
    over https. An entry without a port allows only the scheme's default port.
    """
    for entry in allowed:
        if entry == ANY_PUBLIC and scheme == "https" and port == _PORTS["https"]:
            return True
        name, _, wanted = entry.lower().rpartition(":")
        name, wanted = (name, wanted) if wanted.isdigit() and name else (entry.lower(), "")
        if port != (int(wanted) if wanted else _PORTS[scheme]):
            continue
        if host == name or (name.startswith("*.") and host.endswith(name[1:]) and host != name[2:]):
            return True
    return False


class _PublicOnly(AbstractResolver):
    """Resolves host names like the system; an address that is not public raises an OSError."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        infos = await loop.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        addresses = [(info[0], str(info[4][0])) for info in infos]
        if not addresses or not all(is_public(address) for _, address in addresses):
            raise OSError(f"{host} is not a public address")
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=kind, proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for kind, address in addresses
        ]  # fmt: skip

    async def close(self) -> None:
        """Do nothing, since nothing is open."""


class MediaFetcher:
    """Fetches the files of requests, only from allowed domains (see `allowed_host`)."""

    def __init__(
        self, allowed: Sequence[str] = (), resolver: AbstractResolver | None = None
    ) -> None:
        self._allowed = tuple(allowed)
        self._resolver = resolver or _PublicOnly()
        self._turn = asyncio.Semaphore(_AT_ONCE)
        self._session: aiohttp.ClientSession | None = None

    def allow(self, domains: Sequence[str]) -> None:
        self._allowed = tuple(domains)

    async def fetch_all(
        self, urls: Sequence[str], most_bytes: int, count: Callable[[str, int], None]
    ) -> dict[str, bytes]:
        """Fetch each URL once, concurrently; return the bytes by URL.

        ``count`` is called with the URL and the size of each file when it has come; if it raises an
        error, the other fetches are cancelled.
        """
        if not urls:
            return {}

        async def fetch(url: str) -> bytes:
            file = await self._fetch(url, most_bytes)
            count(url, len(file))
            return file

        tasks = [asyncio.ensure_future(fetch(url)) for url in urls]
        try:
            return dict(zip(urls, await asyncio.gather(*tasks), strict=True))
        finally:
            for task in tasks:
                task.cancel()
            # Before Python 3.12 `wait_for` may swallow the cancel: no file may be counted later.
            await asyncio.wait(tasks)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _fetch(self, url: str, most_bytes: int) -> bytes:
        try:
            async with self._turn:
                return await asyncio.wait_for(self._bytes(url, most_bytes), _SECONDS)
        except (asyncio.TimeoutError, TimeoutError):
            raise _refusal(400, f"did not come within {_SECONDS:.0f} s") from None
        except (aiohttp.ClientError, OSError, ValueError):
            raise _refusal(400, "could not be fetched") from None

    async def _bytes(self, url: str, most_bytes: int) -> bytes:
        session = self._open()
        for _ in range(_REDIRECTS + 1):
            self._check_url(url)
            async with session.get(url, allow_redirects=False) as response:
                if response.status in (301, 302, 303, 307, 308):
                    url = urljoin(url, response.headers.get("Location", ""))
                    continue
                return await _body(response, most_bytes)
        raise _refusal(400, f"was redirected more than {_REDIRECTS} times")

    def _check_url(self, url: str) -> None:
        """Refuse a URL whose host is not allowed, without resolving the host's name."""
        parts = _split(url)
        host = (parts.hostname or "").rstrip(".").lower()
        if not host or parts.username is not None or parts.password is not None:
            raise _refusal(400, "has no plain host name")
        port = parts.port or _PORTS[parts.scheme]
        if not allowed_host(host, port, parts.scheme, self._allowed):
            shown = "".join(c for c in host[:80] if c.isalnum() or c in ".-:")
            raise self._not_allowed(shown)
        if _is_address(host) and not is_public(host):
            raise _refusal(403, "has an inner address")

    def _not_allowed(self, host: str) -> Refusal:
        if not self._allowed:
            return Refusal("media_domain:none", shown=host)
        if ANY_PUBLIC in self._allowed:
            return Refusal("media_domain:http", shown=host)
        return Refusal("media_domain", shown=host)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # It uses no cookies, no proxies of the environment, no decompression (a bomb needs it).
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    resolver=self._resolver, use_dns_cache=False, limit=_AT_ONCE, force_close=True
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                headers={"Accept": "image/*, video/*", "Accept-Encoding": "identity"},
            )
        return self._session


async def _body(response: Any, most_bytes: int) -> bytes:
    """Return the body of a response; refuse an error, compression, or more than ``most_bytes``."""
    if response.status != 200:
        raise _refusal(400, f"was answered with status {response.status}")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _refusal(400, "came compressed")
    if (response.content_length or 0) > most_bytes:
        raise _refusal(413, f"has more than the {most_bytes} bytes allowed")
    data = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK):
        data += chunk
        if len(data) > most_bytes:
            raise _refusal(413, f"has more than the {most_bytes} bytes allowed")
    return bytes(data)


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise _refusal(400, "has an address that cannot be read") from None
    odd = any(c.isspace() or not c.isprintable() or c == "\\" for c in url)
    if odd or len(url) > _LONGEST_URL or parts.scheme not in _PORTS:
        raise _refusal(400, "has an address that cannot be read")
    return parts


def _is_address(host: str) -> bool:
    """Return whether a host is written as numbers, in any form that resolvers understand."""
    if ":" in host:
        return True
    last = host.rsplit(".", 1)[-1]
    return last.isdigit() or last.startswith("0x")


def _refusal(status: int, what: str) -> Refusal:
    return Refusal("remote_image", status=status, what=what)
