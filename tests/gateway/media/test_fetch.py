from __future__ import annotations

import asyncio
import gzip
import socket
from typing import Any

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.test_utils import TestServer

from tests.support.gateway import ask, chat, data_url, gateway, picture
from turbofit.gateway.config import ANY_PUBLIC
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.media import fetch
from turbofit.gateway.media.fetch import MediaFetcher, allowed_host, is_public
from turbofit.gateway.options import GatewayOptions

MOST = 1 << 20
PICTURE = picture(64, 48)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.9", "169.254.169.254", "0.0.0.0", "::1",
        "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
        "224.0.0.1", "255.255.255.255", "100.64.0.1", "not an address", "", "ff02::1",
        "2001:db8::1", "fec0::1", "64:ff9b:1::7f00:1", "::127.0.0.1", "fd00:ec2::254",
        "168.63.129.16", "::ffff:168.63.129.16", "100.100.100.200", "192.0.0.192",
    ],
)  # fmt: skip
def test_inner_addresses_are_known_however_they_are_wrapped(address) -> None:
    assert not is_public(address)
    assert all(map(is_public, ("8.8.8.8", "2606:4700::1111", "64:ff9b::808:808")))


@pytest.mark.parametrize(
    ("host", "port", "scheme", "good"),
    [
        ("example.com", 443, "https", True), ("example.com", 80, "http", True),
        ("example.com", 8080, "http", False), ("www.example.com", 443, "https", False),
        ("a.cdn.org", 443, "https", True), ("cdn.org", 443, "https", False),
        ("evilcdn.org", 443, "https", False), ("host", 8443, "https", True),
        ("host", 443, "https", False),
    ],
)  # fmt: skip
def test_domains(host, port, scheme, good) -> None:
    allowed = ("Example.com", "*.cdn.org", "host:8443")
    assert allowed_host(host, port, scheme, allowed) is good


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("https://example.org/a.png", None),
        ("https://example.org:8443/a.png", "own port"), ("http://example.org/a.png", "by https"),
        ("https://127.0.0.1/a.png", "inner"), ("https://2130706433/a.png", "inner"),
        ("https://0x7f.1/a.png", "inner"), ("https://[::ffff:7f00:1]/a.png", "inner"),
        ("https://[64:ff9b::a9fe:a9fe]/latest/meta-data", "inner"),
        ("https://user@example.org/a.png", "no plain host"),
        ("https://example.org\\@127.0.0.1/", "cannot be read"),
    ],
)  # fmt: skip
def test_any_public_host_means_https_and_no_inner_address(url, word) -> None:
    fetcher = MediaFetcher([ANY_PUBLIC])
    if word is None:
        fetcher._check_url(url)
        return
    with pytest.raises(Refusal) as caught:
        fetcher._check_url(url)
    assert word in caught.value.message


async def test_a_name_that_resolves_anew_is_not_asked_twice(monkeypatch) -> None:
    """Rebinding: the address that was checked is the one that the connection takes."""
    asked = []

    async def public_then_inner(host, *_, **__):
        asked.append(host)
        address = "8.8.8.8" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", public_then_inner)
    resolver = fetch._PublicOnly()
    (first,) = await resolver.resolve("rebinds.org", 443)
    assert (first["host"], first["flags"]) == ("8.8.8.8", socket.AI_NUMERICHOST)
    with pytest.raises(OSError, match="not a public address"):
        await resolver.resolve("rebinds.org", 443)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, ("*",)), ({"host": "0.0.0.0", "api_key": ("k",)}, ("*",)),
        ({"host": "0.0.0.0", "no_auth": True}, ()), ({"trusted_proxies": ("10.0.0.1",)}, ()),
        ({"allowed_media_domains": ("none",)}, ()),
        ({"host": "0.0.0.0", "no_auth": True, "allowed_media_domains": ("a.org",)}, ("a.org",)),
    ],
)  # fmt: skip
def test_who_gets_remote_images_without_a_word(options, allowed, monkeypatch) -> None:
    monkeypatch.delenv("TURBOFIT_API_KEYS", raising=False)
    assert GatewayOptions(**options).config().allowed_media_domains == allowed


@pytest.mark.parametrize("url", ["https://example.org/a.png", "http://example.org/a.png"])
@pytest.mark.parametrize(
    ("allowed", "words"),
    [
        ((), "as none does that is open to all without a key; send the image inline, or start"),
        (("a.org",), "remote images of example.org are not allowed here; send the image inline"),
    ],
)
def test_a_refused_address_is_told_what_is_true_of_it(url, allowed, words) -> None:
    """An https address was once told to come by https."""
    with pytest.raises(Refusal) as caught:
        MediaFetcher(allowed)._check_url(url)
    assert words in caught.value.message
    assert "https" not in caught.value.message
    assert "--allowed-media-domains example.org" in caught.value.message


class ToHere(AbstractResolver):
    """Every name is this machine: what the real resolver would refuse."""

    async def resolve(self, host, port=0, family=socket.AF_INET) -> list[ResolveResult]:
        facts = {"hostname": host, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}
        return [ResolveResult(host="127.0.0.1", **facts)]

    async def close(self) -> None:
        pass


class Site:
    """A web server on loopback that counts."""

    def __init__(self) -> None:
        self.hits: list[str] = []

    async def serve(self, request: web.Request) -> web.StreamResponse:
        self.hits.append(request.path)
        port = request.headers["host"].rpartition(":")[2]
        redirects = {
            "/to-a": "/a.png", "/to-inner": "http://127.0.0.1:1/a.png", "/loop": "/loop",
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
        raise web.HTTPNotFound


def fetched(path: str, resolver: Any = None, allowed=("here.org",)):
    """One fetch: the pictures or the refusal, and the site's hits."""
    came: list[int] = []

    async def run():
        site, app = Site(), web.Application()
        app.router.add_get("/{tail:.*}", site.serve)
        async with TestServer(app, handler_cancellation=True) as server:
            fetcher = MediaFetcher(
                [f"{name}:{server.port}" for name in allowed], resolver or ToHere()
            )
            url = path if "://" in path else f"http://here.org:{server.port}{path}"
            try:
                files = await fetcher.fetch_all([url], MOST, lambda _, size: came.append(size))
                assert came == [len(data) for data in files.values()]
                return files, site.hits
            except Refusal as refusal:
                return refusal, site.hits
            finally:
                await fetcher.close()

    return asyncio.run(run())


@pytest.mark.parametrize("path", ["/a.png", "/to-a"])
def test_pictures_of_allowed_domains_come(path) -> None:
    assert list(fetched(path)[0].values()) == [PICTURE]


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/to-inner", "not allowed"), ("/to-other", "not allowed"), ("/to-file", "cannot be read"),
        ("/loop", "more than 3 times"), ("/zip", "compressed"), ("/big", "1048576"),
        ("/endless", "1048576"), ("/none", "status 404"),
        ("http://user@here.org/a.png", "host name"), ("http://here.org:1:2/", "cannot be read"),
        ("http://elsewhere.org/a.png", "elsewhere.org are not allowed"),
    ],
)  # fmt: skip
def test_everything_else_is_refused(path, word) -> None:
    refusal, _ = fetched(path)
    assert 400 <= refusal.status < 500
    assert word in refusal.message


def test_slow_servers_are_given_up(monkeypatch) -> None:
    monkeypatch.setattr(fetch, "_SECONDS", 0.1)
    refusal, _ = fetched("/slow")
    assert "within" in refusal.message


def test_names_that_mean_this_machine_are_refused_when_they_are_resolved() -> None:
    refusal, hits = fetched("/a.png", fetch._PublicOnly(), allowed=("localhost", "here.org"))
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

    async def fetch_all(self, urls, most_bytes, count):
        self.calls += len(urls)
        return dict.fromkeys(urls, self.data)


REMOTE = {"type": "image_url", "image_url": {"url": "https://here.org/a.png"}}


def test_an_address_is_fetched_once_and_goes_on_inline() -> None:
    fetcher = Same(PICTURE)
    app, upstream = gateway(fetcher=fetcher)
    assert ask(app, body=chat(REMOTE, REMOTE, n=3)).status == 200
    assert fetcher.calls == 1
    sent = upstream.bodies[0]["messages"][0]["content"]
    assert [part["image_url"]["url"] for part in sent[1:]] == [data_url(PICTURE)] * 2


@pytest.mark.parametrize(
    ("fetcher", "status", "words"),
    [(Same(b"<html>"), 415, "no known type"), (None, 403, "--allowed-media-domains")],
)
def test_what_is_no_image_or_of_no_allowed_domain_is_refused(fetcher, status, words) -> None:
    app, upstream = gateway(fetcher=fetcher)
    reply = ask(app, body=chat(REMOTE))
    assert (reply.status, upstream.seen) == (status, [])
    assert words in reply.json["error"]["message"]
