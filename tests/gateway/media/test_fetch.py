from __future__ import annotations

import asyncio
import gzip
import socket
import threading
from ipaddress import ip_address
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from yarl import URL

from tests.support.gateway import ask, chat, data_url, gateway, picture
from tests.support.waiting import HANG, auntil
from tests.virtual_time import settled
from turbofit.core.errors import UsageError
from turbofit.gateway.config import ANY_PUBLIC, GatewayOptions
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.media import fetch
from turbofit.gateway.media.fetch import MediaFetcher, allowed_host
from turbofit.gateway.options import configured

MOST = 1 << 20
INSIDE, NEVER = "no public address that this server finds", "never fetched"
PICTURE = picture(64, 48)


@pytest.mark.parametrize(
    ("host", "port", "scheme", "good"),
    [
        ("example.com", 443, "https", True), ("example.com", 80, "http", True),
        ("example.com", 8080, "http", False), ("www.example.com", 443, "https", False),
        ("a.cdn.org", 443, "https", True), ("cdn.org", 443, "https", False),
        ("evilcdn.org", 443, "https", False), ("host", 8443, "https", True),
        ("host", 443, "https", False), ("fd12::7", 80, "http", True),
        ("fd12::7", 9000, "http", True), ("fd12::7", 81, "http", False),
        ("fd00::1", 443, "https", True), ("fd00:", 1, "https", False),
        ("fd00::1", 1, "https", False), ("fd00::2", 443, "https", True),
        ("fd00::3", 9000, "http", True), ("fd00::3", 80, "http", False),
        ("fd00::4:9000", 80, "http", True), ("fd00::4", 9000, "http", False),
    ],
)  # fmt: skip
def test_domains(host, port, scheme, good) -> None:
    entries = (
        "Example.com", "*.cdn.org", "host:8443", "[fd12::7]", "[fd12::7]:9000",
        "FD00::1", "[fd00:0::2]", "[fd00:0:0::3]:9000", "fd00::4:9000",
    )  # fmt: skip
    assert allowed_host(host, port, scheme, entries) is good


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("https://example.org/a.png", None),
        ("https://example.org:8443/a.png", "port 443"), ("http://example.org/a.png", "by https"),
        ("https://127.0.0.1/a.png", NEVER), ("https://2130706433/a.png", NEVER),
        ("https://0x7f.1/a.png", NEVER), ("https://[::ffff:7f00:1]/a.png", NEVER),
        ("https://[64:ff9b::a9fe:a9fe]/latest/meta-data", NEVER),
        ("https://127\u30020\u30020\u30021/a.png", NEVER),
        ("https://\u2460\u2461\u2466.0.0.1/a.png", NEVER), ("https://@127.0.0.1/a.png", NEVER),
        ("https://10.1.2.3/a.png", INSIDE), ("https://localhost/a.png", NEVER),
        ("https://user@example.org/a.png", "no plain host"),
        ("https://example.org\\@127.0.0.1/", "cannot be read"),
    ],
)  # fmt: skip
def test_any_public_host_means_https_and_no_inner_address(url, word) -> None:
    fetcher = MediaFetcher([ANY_PUBLIC])
    if word is None:
        assert str(fetcher._checked(url)) == url
        return
    with pytest.raises(Refusal) as caught:
        fetcher._checked(url)
    assert word in caught.value.message


def test_an_international_domain_is_allowed_in_both_spellings() -> None:
    for entry in ("bücher.example", "xn--bcher-kva.example"):
        url = MediaFetcher([entry])._checked("https://B\xfccher.example/a.png")
        assert url.raw_host == "xn--bcher-kva.example"


def lookups(monkeypatch: pytest.MonkeyPatch, *answers: tuple[str, ...]) -> list[str]:
    """Answer each look-up of a name by these addresses; return the names that are asked for."""
    asked: list[str] = []

    def look_up(host: str, port: int, *_: object) -> list[Any]:
        asked.append(host)
        if not answers:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        found = answers[min(len(asked), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (it, port)) for it in found]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


def test_a_name_that_resolves_anew_is_not_asked_twice(monkeypatch) -> None:
    """Rebinding: the address that was checked is the one that the connection takes."""
    lookups(monkeypatch, ("8.8.8.8",), ("127.0.0.1",))

    async def main() -> None:
        (first,) = await fetch._Names().resolve("rebinds.org", 443)
        assert (first["host"], first["flags"]) == ("8.8.8.8", socket.AI_NUMERICHOST)
        with pytest.raises(OSError, match="not a public address"):
            await fetch._Names().resolve("rebinds.org", 443)

    asyncio.run(main())


@pytest.mark.parametrize(
    "found", [("8.8.8.8", "127.0.0.1"), ("10.0.0.1", "8.8.8.8"), ("127.0.0.1",), (), None]
)
def test_a_name_with_one_inner_address_is_refused_in_the_words_of_an_unknown_one(
    found, monkeypatch
) -> None:
    """Else clients would learn which names there are inside."""
    lookups(monkeypatch, *([] if found is None else [found]))

    async def main() -> Refusal:
        with pytest.raises(Refusal) as caught:
            await MediaFetcher([ANY_PUBLIC]).fetch_all(["https://x.org/a?token=1"], MOST, print)
        return caught.value

    refusal = asyncio.run(main())
    assert (refusal.status, refusal.message) == (
        400,
        f"https://x.org/a: a remote image {fetch._INSIDE}",
    )
    assert INSIDE in refusal.message


def test_an_inner_address_is_not_dialled_whoever_gave_it(monkeypatch) -> None:
    """A resolver or a URL that was not checked: the socket is."""
    monkeypatch.setattr(MediaFetcher, "_checked", lambda _, url: URL(url))

    async def main() -> None:
        came = []

        async def heard(_: object, writer: asyncio.StreamWriter) -> None:
            came.append(writer.close())

        async with await asyncio.start_server(heard, "127.0.0.1", 0) as server:
            host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            with pytest.raises(Refusal, match=INSIDE):
                await MediaFetcher([host]).fetch_all([f"http://{host}/a.png"], MOST, print)
        assert came == []

    asyncio.run(main())


def test_silent_names_hold_no_thread_of_others_and_no_turn_of_another_client(monkeypatch) -> None:
    """A client leaves: its permits end with its look-ups, which nothing can end."""
    answer, asked = threading.Event(), []

    def silent(host: str, *_: object) -> None:
        asked.append(host)
        answer.wait(HANG)
        raise socket.gaierror(socket.EAI_AGAIN, "no answer")

    monkeypatch.setattr(socket, "getaddrinfo", silent)

    async def main() -> None:
        fetcher = MediaFetcher([ANY_PUBLIC])

        def ask(who: str) -> asyncio.Task[Any]:
            urls = [f"https://{who}{number}.org/" for number in range(20)]
            return asyncio.ensure_future(fetcher.fetch_all(urls, MOST, print, who))

        one = ask("one")
        await auntil(lambda: len(asked) == 12, "three quarters of the permits")
        # The threads that all others share are free.
        assert await asyncio.wait_for(asyncio.to_thread(int, "1"), HANG) == 1
        one.cancel()
        await asyncio.wait({one})
        again, other = ask("one"), ask("other")
        await auntil(lambda: len(asked) == 15, "most of what is left")
        assert sum(host.startswith("other") for host in asked) == 3
        for task in (again, other):
            task.cancel()
        await asyncio.wait({again, other})
        answer.set()
        await auntil(lambda: fetcher._permits._free == 16, "all permits to be given back")
        assert (fetcher._permits._held, fetcher._permits._lines) == ({}, {})

    asyncio.run(main())


async def test_a_client_gets_no_turn_that_others_may_need() -> None:
    permits, got = fetch.FetchPermits(8), []

    async def take(who: str) -> None:
        await permits.take(who)
        got.append(who)

    def given(who: str) -> list[str]:
        permits.give(who)
        return got

    tasks = [asyncio.ensure_future(take(who)) for who in "aaaaaaaabbcde"]
    await settled()
    assert got == list("aaaaaabc")
    tasks[-2].cancel()  # d leaves while it waits
    await settled()
    given("a")
    await settled()
    assert got == list("aaaaaabce")
    for who, next_ones in (("a", ""), ("a", "b"), ("a", "a"), ("b", "")):
        del got[:]
        given(who)
        await settled()
        assert got == list(next_ones), who
    for who in "aaaabce":
        given(who)
    assert (permits._free, permits._held, permits._lines) == (8, {}, {})


async def test_clients_that_have_no_turn_get_one_in_turn() -> None:
    """Else who came first would get each that it gives back."""
    permits, got = fetch.FetchPermits(2), []

    async def take(who: str) -> None:
        await permits.take(who)
        got.append(who)
        await asyncio.sleep(1)
        permits.give(who)

    await asyncio.gather(*(take(who) for who in "aaabbbccc"))
    assert got == list("ababcabcc")


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, ("*",)), ({"host": "0.0.0.0", "api_key": ("k",)}, ("*",)),
        ({"host": "0.0.0.0", "no_auth": True}, ()), ({"trusted_proxies": ("10.0.0.1",)}, ()),
        ({"allowed_media_domains": ("none",)}, ()),
        ({"host": "0.0.0.0", "no_auth": True, "allowed_media_domains": ("a.org",)}, ("a.org",)),
        ({"allowed_media_networks": ("10.0.0.0/8",), "allowed_media_domains": ("a",)}, ("a",)),
    ],
)  # fmt: skip
def test_who_gets_remote_images_without_a_word(options, allowed, monkeypatch) -> None:
    monkeypatch.delenv("TURBOFIT_API_KEYS", raising=False)
    assert configured(GatewayOptions(**options)).allowed_media_domains == allowed


@pytest.mark.parametrize("domains", [(), ("*",), ("none",)])
def test_networks_count_for_named_hosts_alone(domains) -> None:
    given = {"allowed_media_networks": ("10.0.0.0/8",), "allowed_media_domains": domains}
    with pytest.raises(UsageError, match="that --allowed-media-domains names"):
        configured(GatewayOptions(**given))


def fetch_in_networks(monkeypatch, url: str, answer: str, allowed=("minio.lan:9000", "*")) -> str:
    """Return why a URL was not fetched; all sockets are closed, and the name has this address."""
    lookups(monkeypatch, (answer,))

    def closed(*_: object) -> None:
        raise OSError("dialled")

    async def main() -> Refusal:
        monkeypatch.setattr(socket, "socket", closed)
        with pytest.raises(Refusal) as caught:
            await MediaFetcher(allowed, ["10.1.0.0/16"]).fetch_all([url], MOST, print)
        return caught.value

    return asyncio.run(main()).message


@pytest.mark.parametrize(
    ("url", "address", "words"),
    [
        ("http://minio.lan:9000/a.png", "10.1.2.3", "takes no connection"),
        ("http://minio.lan:9000/a.png", "10.2.2.3", INSIDE),
        ("http://minio.lan:9000/a.png", "127.0.0.1", INSIDE),
        ("http://minio.lan:9000/a.png", "169.254.169.254", INSIDE),
        ("https://evil.org/a.png", "10.1.2.3", INSIDE),  # allowed by * alone
        ("http://10.1.2.3:9000/a.png", "10.1.2.3", "not allowed here"),
        ("http://localhost:9000/a.png", "10.1.2.3", NEVER),
    ],
)
def test_a_private_network_is_dialled_for_named_hosts_alone(
    url, address, words, monkeypatch
) -> None:
    assert words in fetch_in_networks(monkeypatch, url, address)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("http://10.1.2.3:9000/a", ["10.1.2.3:9000", "10.1.2.3"]),
        ("http://[fd12::7]/a", ["[fd12::7]", "fd12::7"]),
        ("http://[fd12::7]:81/a", ["[fd12::7]:81", "fd12::7"]),
        ("https://192.168.1.7/a", ["192.168.1.7", "192.168.1.7"]),
        ("http://[::ffff:a00:1]/a", [f"[{ip_address('::ffff:a00:1')}]", "10.0.0.1"]),
        ("http://[64:ff9b::a00:1]:81/a", ["[64:ff9b::a00:1]:81", "10.0.0.1"]),
    ],
)
@pytest.mark.parametrize("allowed", [(), ("a.org",), ("*",)])
def test_the_hint_of_a_private_address_leads_to_its_picture(url, options, allowed) -> None:
    with pytest.raises(Refusal) as caught:
        MediaFetcher(allowed)._checked(url)
    if url[:5] == "http:" or "*" not in allowed:
        domain, network = options
        named = f"--allowed-media-domains {domain} --allowed-media-networks {network}"
        assert caught.value.message.endswith(named)
    fetcher = MediaFetcher(options[:1], options[1:])
    assert fetcher._networks_of(fetcher._checked(url))


@pytest.mark.parametrize("url", ["https://example.org/a.png", "http://example.org/a.png"])
@pytest.mark.parametrize(
    ("allowed", "words"),
    [
        ((), "because clients need no key; send the image inline, or start"),
        (("a.org",), "remote images of example.org are not allowed here; send the image inline"),
    ],
)
def test_a_refused_address_is_told_what_is_true_of_it(url, allowed, words) -> None:
    """An https address was once answered “by https”."""
    with pytest.raises(Refusal) as caught:
        MediaFetcher(allowed)._checked(url)
    assert words in caught.value.message
    assert "https" not in caught.value.message
    assert "--allowed-media-domains example.org" in caught.value.message


class Site:
    """A web server on loopback that counts."""

    def __init__(self) -> None:
        self.hits: list[str] = []

    async def serve(self, request: web.Request) -> web.StreamResponse:
        self.hits.append(request.path)
        port = request.headers["host"].rpartition(":")[2]
        redirects = {
            "/to-a": "/a.png", "/to-inner": "http://127.0.0.1:1/a.png", "/loop": "/loop",
            "/to-evil": "https://evil.org/a.png",
            "/to-other": f"http://other.org:{port}/a.png", "/to-file": "file:///etc/hostname",
        }  # fmt: skip
        bodies = {"/a.png": PICTURE, "/big": bytes(MOST + 1)}
        if request.path in redirects:
            raise web.HTTPFound(redirects[request.path])
        if request.path in bodies:
            return web.Response(body=bodies[request.path])
        if request.path == "/zip":
            return web.Response(body=gzip.compress(PICTURE), headers={"Content-Encoding": "gzip"})
        if request.path == "/slow":
            await asyncio.Event().wait()
        if request.path == "/endless":
            response = web.StreamResponse()
            await response.prepare(request)
            for _ in range(100):
                await response.write(bytes(1 << 16))
            return response
        if request.path == "/close":
            assert request.transport is not None
            request.transport.close()
        raise web.HTTPNotFound


def fetched(path: str, *, here: bool = True, allowed=("here.org",), networks=()):
    """One fetch: the pictures or the refusal, and the site's hits.

    ``here``: every name is this machine, and its address counts as public; or as one of the
    ``networks``, if there are some.
    """
    came: list[int] = []

    async def run():
        site, app = Site(), web.Application()
        app.router.add_get("/{tail:.*}", site.serve)
        async with TestServer(app, handler_cancellation=True) as server:
            names = [name if name == "*" else f"{name}:{server.port}" for name in allowed]
            fetcher = MediaFetcher(names, networks)
            url = path if "://" in path else f"http://here.org:{server.port}{path}"
            try:
                files = await fetcher.fetch_all([url], MOST, lambda _, size: came.append(size))
                assert came == [len(data) for data in files.values()]
                return files, site.hits
            except Refusal as refusal:
                return refusal, site.hits

    with pytest.MonkeyPatch.context() as patch:
        if here:
            lookups(patch, ("127.0.0.1",))
            patch.setattr(fetch, "may_dial", lambda _, of=(): bool(of) or not networks)
        return asyncio.run(run())


@pytest.mark.parametrize("path", ["/a.png", "/to-a"])
def test_pictures_of_allowed_domains_come(path) -> None:
    assert list(fetched(path)[0].values()) == [PICTURE]


def test_a_redirect_takes_no_network_with_it() -> None:
    """A named host may be in a private network; whom it names next is allowed by ``*`` alone."""
    inside = {"allowed": ("here.org", "*"), "networks": ("10.0.0.0/8",)}
    assert list(fetched("/to-a", **inside)[0].values()) == [PICTURE]
    refusal, hits = fetched("/to-evil", **inside)
    assert (INSIDE in refusal.message, hits) == (True, ["/to-evil"])


def test_no_proxy_of_the_environment_is_asked(monkeypatch) -> None:
    """Nothing listens there; a proxy would connect wherever it likes."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert list(fetched("/a.png")[0].values()) == [PICTURE]


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/to-inner", "not allowed"), ("/to-other", "not allowed"), ("/to-file", "cannot be read"),
        ("/loop", "more than 3 times"), ("/zip", "compressed"), ("/big", "1048576"),
        ("/endless", "1048576"), ("/none", "status 404"),
        ("http://user@here.org/a.png", "host name"), ("http://here.org:1:2/", "cannot be read"),
        ("http://elsewhere.org/a.png", "elsewhere.org are not allowed"),
        ("/close", "its host broke off"), ("/none?token=secret", "here.org"),
    ],
)  # fmt: skip
def test_everything_else_is_refused(path, word) -> None:
    refusal, _ = fetched(path)
    assert 400 <= refusal.status < 500
    assert word in refusal.message
    assert "secret" not in refusal.message
    assert "user@" not in refusal.message


def test_slow_servers_are_given_up(monkeypatch) -> None:
    monkeypatch.setattr(fetch, "_SECONDS", 0.1)
    refusal, _ = fetched("/slow")
    assert "within" in refusal.message


def test_names_that_mean_this_machine_are_refused_when_they_are_resolved() -> None:
    refusal, hits = fetched("http://localhost/a.png", here=False, allowed=("localhost",))
    assert isinstance(refusal, Refusal)
    assert hits == []


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "2130706433", "0x7f.1", "127.1"])
async def test_addresses_are_refused_even_if_they_are_allowed(host) -> None:
    fetcher = MediaFetcher((host.strip("[]"), host, f"{host}:80"))
    with pytest.raises(Refusal) as caught:
        await fetcher.fetch_all([f"http://{host}/a.png"], MOST, print)
    assert caught.value.status in (400, 403)


class Same(MediaFetcher):
    """Every address has the same file."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data, self.calls = data, 0

    async def fetch_all(self, urls, most_bytes, count, who=""):
        self.calls += len(urls)
        return dict.fromkeys(urls, self.data)


REMOTE = {"type": "image_url", "image_url": {"url": "https://here.org/a.png"}}


def test_an_address_is_fetched_once_and_goes_on_inline() -> None:
    fetcher = Same(PICTURE)
    app, upstream = gateway(fetcher=fetcher)
    assert (ask(app, body=chat(REMOTE, REMOTE, n=3)).status, fetcher.calls) == (200, 1)
    sent = upstream.bodies[0]["messages"][0]["content"]
    assert [part["image_url"]["url"] for part in sent[1:]] == [data_url(PICTURE)] * 2


@pytest.mark.parametrize(
    ("fetcher", "status", "words"),
    [
        (Same(b"<html>"), 415, "https://here.org/a.png: the type of an image is unknown"),
        (None, 403, "--allowed-media-domains"),
    ],
)
def test_what_is_no_image_or_of_no_allowed_domain_is_refused(fetcher, status, words) -> None:
    app, upstream = gateway(fetcher=fetcher)
    reply = ask(app, body=chat(REMOTE))
    assert (reply.status, upstream.seen) == (status, [])
    assert words in reply.json["error"]["message"]
