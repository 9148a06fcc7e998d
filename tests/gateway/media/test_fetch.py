from __future__ import annotations

import asyncio
import gzip
import socket
from typing import Any

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from tests.support.gateway import ask, chat, data_url, gateway, picture
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.media import fetch
from turbofit.gateway.media.fetch import MediaFetcher, allowed_host, is_public

MOST = 1 << 20
PICTURE = picture(64, 48)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.9", "169.254.169.254", "0.0.0.0", "::1",
        "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "224.0.0.1", "255.255.255.255", "100.64.0.1",
        "not an address", "", "ff02::1", "2001:db8::1", "fec0::1",
    ],
)  # fmt: skip
def test_inner_addresses_are_known_however_they_are_wrapped(address) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_public_addresses_are_public(address) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    ("host", "port", "scheme", "good"),
    [
        ("example.com", 443, "https", True),
        ("example.com", 80, "http", True),
        ("example.com", 8080, "http", False),
        ("www.example.com", 443, "https", False),
        ("a.cdn.org", 443, "https", True),
        ("cdn.org", 443, "https", False),
        ("evilcdn.org", 443, "https", False),
        ("host", 8443, "https", True),
        ("host", 443, "https", False),
    ],
)
def test_domains(host, port, scheme, good) -> None:
    allowed = ("Example.com", "*.cdn.org", "host:8443")
    assert allowed_host(host, port, scheme, allowed) is good


class ToHere(AbstractResolver):
    """Every name is this machine: what the real resolver would refuse."""

    async def resolve(self, host, port=0, family=socket.AF_INET) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host, host="127.0.0.1", port=port, family=socket.AF_INET, proto=0, flags=0
            )
        ]

    async def close(self) -> None:
        pass


class Site:
    """A web server on loopback that counts."""

    def __init__(self) -> None:
        self.hits: list[str] = []

    async def serve(self, request: web.Request) -> web.StreamResponse:
        self.hits.append(request.path)
        path, host = request.path, request.headers["host"]
        if path == "/a.png":
            return web.Response(body=PICTURE)
        if path == "/to-a":
            raise web.HTTPFound("/a.png")
        if path == "/to-inner":
            raise web.HTTPFound("http://127.0.0.1:1/a.png")
        if path == "/to-other":
            raise web.HTTPFound(f"http://other.org:{host.rpartition(':')[2]}/a.png")
        if path == "/to-file":
            raise web.HTTPFound("file:///etc/hostname")
        if path == "/loop":
            raise web.HTTPFound("/loop")
        if path == "/zip":
            return web.Response(body=gzip.compress(PICTURE), headers={"Content-Encoding": "gzip"})
        if path == "/big":
            return web.Response(body=bytes(MOST + 1))
        if path == "/slow":
            await asyncio.Event().wait()
            return web.Response(body=PICTURE)
        if path == "/endless":
            response = web.StreamResponse()
            await response.prepare(request)
            for _ in range(100):
                await response.write(bytes(1 << 16))
            return response
        if path == "/page":
            return web.Response(text="<html></html>", content_type="image/png")
        raise web.HTTPNotFound


def fetched(path: str, resolver: Any = None, allowed=("here.org",), times: int = 1):
    """One or more fetches of the same address; returns the pictures and the site's hits."""

    came: list[int] = []

    async def run():
        site = Site()
        app = web.Application()
        app.router.add_get("/{tail:.*}", site.serve)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        await web.SockSite(runner, listener).start()
        port = listener.getsockname()[1]
        fetcher = MediaFetcher([f"{name}:{port}" for name in allowed], resolver or ToHere())
        url = path if "://" in path else f"http://here.org:{port}{path}"
        try:
            files = await fetcher.fetch_all([url] * times, MOST, came.append)
            assert came == [len(data) for data in files.values()] * times
            return files, site.hits
        except Refusal as refusal:
            return refusal, site.hits
        finally:
            await fetcher.close()
            await runner.cleanup()

    return asyncio.run(run())


@pytest.mark.parametrize("path", ["/a.png", "/to-a"])
def test_pictures_of_allowed_domains_come(path) -> None:
    files, _ = fetched(path)
    assert list(files.values()) == [PICTURE]


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
    assert isinstance(refusal, Refusal)
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
def test_addresses_are_refused_even_if_they_are_allowed(host) -> None:
    async def run():
        fetcher = MediaFetcher((host.strip("[]"), host, f"{host}:80"))
        try:
            await fetcher.fetch_all([f"http://{host}/a.png"], MOST, print)
        except Refusal as refusal:
            return refusal
        finally:
            await fetcher.close()

    refusal = asyncio.run(run())
    assert refusal is not None
    assert refusal.status in (400, 403)


def test_an_address_is_fetched_once_and_goes_on_inline() -> None:
    class Once(MediaFetcher):
        calls = 0

        async def fetch_all(self, urls, most_bytes, count):
            Once.calls += len(urls)
            return dict.fromkeys(urls, PICTURE)

    url = "https://here.org/a.png"
    parts = [{"type": "image_url", "image_url": {"url": url}}] * 2
    app, upstream = gateway(fetcher=Once())
    assert ask(app, body=chat(*parts, n=3)).status == 200
    assert Once.calls == 1
    sent = upstream.bodies[0]["messages"][0]["content"]
    assert [part["image_url"]["url"] for part in sent[1:]] == [data_url(PICTURE)] * 2


def test_what_is_fetched_and_is_no_image_is_refused() -> None:
    class Page(MediaFetcher):
        async def fetch_all(self, urls, most_bytes, count):
            return dict.fromkeys(urls, b"<html>")

    part = {"type": "image_url", "image_url": {"url": "https://here.org/a.png"}}
    app, upstream = gateway(fetcher=Page())
    reply = ask(app, body=chat(part))
    assert (reply.status, upstream.seen) == (415, [])
    assert "no known type" in reply.json["error"]["message"]


def test_without_allowed_domains_nothing_is_fetched() -> None:
    app, upstream = gateway()
    part = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    reply = ask(app, body=chat(part))
    assert (reply.status, upstream.seen) == (403, [])
    assert "--allowed-media-domains" in reply.json["error"]["message"]
