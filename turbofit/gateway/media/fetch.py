"""Fetches remote images and videos, each only once and only from allowed domains.

The host of a URL is checked in the form in which aiohttp connects to the host. An address is
checked after the look-up of its name, and again where its socket is made, before a byte is sent.
The name is looked up only once. A private address may be dialled only for a host that
``--allowed-media-domains`` names, in a network of ``--allowed-media-networks``.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urljoin

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from turbofit.core.process.interpreter import in_daemon_thread
from turbofit.gateway.config import ANY_PUBLIC
from turbofit.gateway.http.connections import ip_address
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.media.addresses import PRIVATE, Network, innermost, may_dial, private_networks

_REDIRECTS: Final = 3
_SECONDS: Final = 10.0
_AT_ONCE: Final = 16
#: The most permits that one client may hold for each permit that stays free. But the last free
#: permit may go to a client that holds none.
_SHARE: Final = 3
_PORTS: Final = {"http": 80, "https": 443}
_LONGEST_URL: Final = 4096
_CHUNK: Final = 1 << 16
#: What refusals say of an inner address, of a name of an inner address, and of an unknown name: the
#: same words, so that they do not tell which names exist here.
_INSIDE: Final = (
    "has no public address that this server finds; a host of your own network needs"
    " --allowed-media-domains with its name, and --allowed-media-networks with its network"
)
_NEVER: Final = (
    "is at an address that is never fetched (this machine, link-local, a cloud's metadata);"
    " send the image inline"
)
_UNREADABLE: Final = "has an address that cannot be read"
#: The parts of a URL that a refusal leaves out: user, password and query.
_SECRETS: Final = re.compile(r"(?<=//)[^/?#]*@|[?#].*", re.DOTALL)
#: The most characters of a URL that a refusal repeats.
_SHOWN: Final = 200


def allowed_host(host: str, port: int, scheme: str, allowed: Sequence[str]) -> bool:
    """Return whether a URL's host, in lower case without a final dot, is allowed.

    An entry ``*.example.com`` allows each name below that domain. An entry ``*`` allows any host
    over https. An entry without a port allows only the scheme's default port. An IPv6 address with
    a port is in brackets; ``host`` and entries are compared in the address's shortest form.
    """
    for entry in allowed:
        if entry == ANY_PUBLIC and scheme == "https" and port == _PORTS["https"]:
            return True
        name, wanted = _host_and_port(entry.lower())
        if port != (int(wanted) if wanted else _PORTS[scheme]):
            continue
        if host == name or (name.startswith("*.") and host.endswith(name[1:]) and host != name[2:]):
            return True
    return False


def _host_and_port(entry: str) -> tuple[str, str]:
    """Return the host that an entry names, and its port; "" for no port."""
    name, _, port = entry.rpartition(":")
    if ip_address(entry.strip("[]")) is not None or not (name and port.isdigit()):
        name, port = entry, ""
    name = name.strip("[]")
    return str(ip_address(name) or name), port


class _Names(AbstractResolver):
    """Resolves host names like the system; an address that may not be dialled raises an OSError.

    Each look-up has a thread of its own, since uvloop and asyncio have only a few threads for
    look-ups, and a silent name server would block these. A waiting thread does not delay the exit.
    """

    #: The last look-up, which continues after a cancellation; None before the first look-up.
    asking: asyncio.Future[list[Any]] | None = None
    #: The private networks in which the host of the present URL may be.
    networks: Sequence[Network] = ()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        def ask() -> list[Any]:
            try:
                return socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
            except (OSError, UnicodeError) as exc:
                raise OSError(f"{host} is not resolved: {exc}") from exc

        self.asking = asyncio.wrap_future(in_daemon_thread(ask, "resolver"))
        infos = await asyncio.shield(self.asking)
        addresses = [(info[0], str(info[4][0])) for info in infos]
        if not addresses or not all(may_dial(it, self.networks) for _, it in addresses):
            raise OSError(f"{host} is not a public address")
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=kind, proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for kind, address in addresses
        ]  # fmt: skip

    def make_socket(self, address: Any) -> socket.socket:
        """Make a socket for an address of `socket.getaddrinfo`, if it may be dialled."""
        family, kind, proto, _, where = address
        if not may_dial(where[0], self.networks):
            raise _NotPublicError(f"{where[0]} is not a public address")
        return socket.socket(family, kind, proto)

    async def close(self) -> None:
        """Do nothing, since nothing is open."""


class _NotPublicError(OSError):
    """An address is not public, so no connection is made."""


class FetchPermits:
    """Permits at most ``most`` fetches at once, and keeps some permits free for other clients.

    A single client gets three quarters of the permits. Two clients that keep asking hold equal
    numbers of permits after a while.
    """

    def __init__(self, most: int) -> None:
        self._free, self._held = most, Counter[str]()
        self._lines: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def take(self, who: str) -> None:
        """Wait for a permit for the client ``who``."""
        permit = asyncio.get_running_loop().create_future()
        self._lines.setdefault(who, deque()).append(permit)
        self._next()
        try:
            await permit
        except asyncio.CancelledError:
            if not permit.cancelled():  # the client had just got the permit
                self.give(who)
            raise

    def give(self, who: str) -> None:
        """Give back a permit of the client ``who``."""
        self._free += 1
        self._held[who] -= 1
        self._held += Counter()  # forgets clients without a permit
        self._next()

    def _next(self) -> None:
        """Give free permits to waiting clients; a client with a new permit becomes the last one."""
        for who, line in tuple(self._lines.items()):
            while line and self._free and self._held[who] < max(1, _SHARE * (self._free - 1)):
                permit = line.popleft()
                if not permit.done():  # else the client has left
                    self._held[who] += 1
                    self._free -= 1
                    permit.set_result(None)
                    self._lines.move_to_end(who)
            if not line:
                del self._lines[who]


class MediaFetcher:
    """Fetches the files of requests, only from allowed domains (see `allowed_host`).

    ``networks`` are the private networks in which hosts may be that ``allowed`` names.
    """

    def __init__(self, allowed: Sequence[str] = (), networks: Sequence[str] = ()) -> None:
        self._permits = FetchPermits(_AT_ONCE)
        self.allow(allowed, networks)

    def allow(self, domains: Sequence[str], networks: Sequence[str]) -> None:
        self._allowed, self._networks = tuple(domains), private_networks(networks)

    async def fetch_all(
        self,
        urls: Sequence[str],
        most_bytes: int,
        count: Callable[[str, int], None],
        who: str = "",
    ) -> dict[str, bytes]:
        """Fetch each URL once, concurrently; return the bytes by URL.

        ``count`` is called with the URL and the size in bytes of each file that has come. If
        ``count`` raises an error, the other fetches are cancelled. ``who`` is the client.
        """
        if not urls:
            return {}

        async def fetch(url: str) -> bytes:
            with about_url(url):
                file = await self._fetch(url, most_bytes, who)
            count(url, len(file))
            return file

        tasks = [asyncio.ensure_future(fetch(url)) for url in urls]
        try:
            return dict(zip(urls, await asyncio.gather(*tasks), strict=True))
        finally:
            for task in tasks:
                task.cancel()
            # Before Python 3.12 `wait_for` may swallow a cancellation. So wait for the tasks, which
            # might still call ``count``.
            await asyncio.wait(tasks)

    async def _fetch(self, url: str, most_bytes: int, who: str) -> bytes:
        names = _Names()

        def looked_up(asking: asyncio.Future[list[Any]]) -> None:
            asking.exception()  # otherwise asyncio would report an error that nobody awaits
            self._permits.give(who)

        await self._permits.take(who)
        try:
            return await asyncio.wait_for(self._bytes(url, most_bytes, names), _SECONDS)
        except (asyncio.TimeoutError, TimeoutError):
            raise _refusal(400, f"did not come within {_SECONDS:.0f} s") from None
        except (aiohttp.ClientError, OSError, ValueError, RuntimeError) as exc:
            raise _refusal(400, _why(exc)) from None
        finally:
            if names.asking is None:
                self._permits.give(who)
            else:  # give the permit back when the thread of the look-up has ended
                names.asking.add_done_callback(looked_up)

    async def _bytes(self, url: str, most_bytes: int, names: _Names) -> bytes:
        # No cookies, no proxies of the environment, and no decompression, which could be a bomb.
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=names,
                use_dns_cache=False,
                force_close=True,
                socket_factory=names.make_socket,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            headers={"Accept": "image/*, video/*", "Accept-Encoding": "identity"},
        ) as session:
            for _ in range(_REDIRECTS + 1):
                checked = self._checked(url)
                names.networks = self._networks_of(checked)
                async with session.get(checked, allow_redirects=False) as response:
                    if response.status not in (301, 302, 303, 307, 308):
                        return await _body(response, most_bytes)
                    url = urljoin(url, response.headers.get("Location", ""))
        raise _refusal(400, f"was redirected more than {_REDIRECTS} times")

    def _checked(self, url: str) -> URL:
        """Return the parsed URL if its host is allowed; refuse it before any look-up of the name.

        The checked host is the host of the connection: in ASCII, with ASCII full stops only.
        """
        parts = _parsed(url)
        host = (parts.raw_host or "").rstrip(".")
        if not host or parts.user is not None or parts.password is not None:
            raise _refusal(400, "has no plain host name")
        # Resolvers read a host as an address if it has a colon, or ends with a number.
        end = host.rpartition(".")[2]
        is_address = ":" in host or end.isdigit() or end.startswith("0x")
        if (is_address and not may_dial(host, PRIVATE)) or end == "localhost":
            raise _refusal(403, _NEVER)
        if not _is_allowed(parts, self._allowed):
            raise self._not_allowed(parts, is_private=is_address and not may_dial(host))
        if is_address and not may_dial(host, self._networks_of(parts)):
            raise _refusal(403, _INSIDE)
        return parts

    def _networks_of(self, url: URL) -> tuple[Network, ...]:
        """Return the private networks in which the host may be: none, if only ``*`` allows it."""
        named = [entry for entry in self._allowed if entry != ANY_PUBLIC]
        return self._networks if _is_allowed(url, named) else ()

    def _not_allowed(self, url: URL, *, is_private: bool) -> Refusal:
        """Return the refusal of a host; ``is_private``: the host is a private address."""
        host, port = (url.raw_host or "").rstrip("."), url.port or _PORTS[url.scheme]
        shown = "".join(c for c in host[:80] if c.isalnum() or c in ".-:")
        address = f"[{shown}]" if ":" in shown else shown
        name = address if port == _PORTS[url.scheme] else f"{address}:{port}"
        inside = ", and --allowed-media-networks NETWORK if it is on a private network"
        if is_private:
            inside = f" --allowed-media-networks {innermost(host)}"
        row = "media_domain"
        if not self._allowed:
            row = "media_domain:none"
        elif ANY_PUBLIC in self._allowed and not is_private:
            row = "media_domain:http"
        return Refusal(row, shown=shown, name=name, inside=inside)


def _is_allowed(url: URL, allowed: Sequence[str]) -> bool:
    """Return whether entries allow the host, in ASCII or with its own letters."""
    spellings = ((url.raw_host or "").rstrip("."), (url.host or "").rstrip("."))
    port = url.port or _PORTS[url.scheme]
    return any(allowed_host(name, port, url.scheme, allowed) for name in spellings)


@contextmanager
def about_url(url: str) -> Iterator[None]:
    """Let the message of a refusal begin with the URL, without its query and password."""
    try:
        yield
    except Refusal as refusal:
        refusal.message = f"{_SECRETS.sub('', url)[:_SHOWN]}: {refusal.message}"
        raise


def _why(exc: Exception) -> str:
    """Return why a fetch failed, in words that tell nothing about this server's own network.

    An unknown name and a name of an inner address get the same words.
    """
    inner = getattr(exc, "os_error", None)
    if isinstance(exc, aiohttp.ClientConnectorDNSError) or isinstance(inner, _NotPublicError):
        return _INSIDE
    if isinstance(exc, ValueError):  # a malformed international name
        return _UNREADABLE
    if isinstance(exc, aiohttp.ClientSSLError):
        return "could not be fetched: the TLS connection failed, or the certificate is not valid"
    if isinstance(exc, aiohttp.ClientConnectorError):
        return "could not be fetched: its host takes no connection"
    return "could not be fetched: its host broke off, or gave no valid answer"


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


def _parsed(url: str) -> URL:
    """Return a parsed URL; refuse a long or odd one, and schemes other than http and https."""
    if len(url) > _LONGEST_URL:  # checked first: parsing a long URL would delay all requests
        raise _refusal(400, _UNREADABLE)
    odd = any(c.isspace() or not c.isprintable() or c == "\\" for c in url)
    try:
        parts = URL(url)
    except ValueError:
        odd = True
    if odd or parts.scheme not in _PORTS:
        raise _refusal(400, _UNREADABLE)
    return parts


def _refusal(status: int, what: str) -> Refusal:
    return Refusal("remote_image", status=status, what=what)
