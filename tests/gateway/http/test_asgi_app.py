"""Who may ask: keys, hosts, web pages of others."""

from __future__ import annotations

import pytest

from tests.support.gateway import (
    CHAT,
    ask,
    call,
    chat,
    gateway,
)


def test_keys() -> None:
    app, upstream = gateway(api_key=("one", "two"))
    assert ask(app, "/health").status == ask(app, "/health/").status == 503
    assert ask(app, "/healthy").status == 401
    wrong = ({"authorization": "Bearer no"}, {"authorization": "two"}, {"x-api-key": ""})
    for headers in ({}, *wrong):
        reply = ask(app, body=chat(), headers=headers)
        assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    for path in ("/v1/nothing", "/metrics", "/v1/models/"):
        assert ask(app, path).status == 401
    assert upstream.seen == []
    for headers in ({"authorization": "Bearer two"}, {"x-api-key": "one"}):
        assert ask(app, body=chat(), headers=headers).status == 200
    assert all("uthorization" not in key for *_, headers in upstream.seen for key in headers)


def test_web_pages_are_closed_out_unless_asked_for() -> None:
    app, upstream = gateway()
    reply = ask(app, body=chat(), headers={"origin": "https://evil.example"})
    assert reply.status == 403
    assert "--allow-origins https://evil.example" in reply.json["error"]["message"]
    reply = ask(app, body=chat(), headers={"origin": "https://" + "a" * 10_000})
    assert len(reply.json["error"]["message"]) < 300
    page = {"origin": "https://a.example"}
    assert ask(app, CHAT, method="OPTIONS", headers=page).status == 403
    assert (ask(app, CHAT, method="OPTIONS").status, upstream.seen) == (405, [])
    app, _ = gateway(allow_origins=("https://a.example",))
    reply = ask(app, CHAT, method="OPTIONS", headers=page)
    assert (reply.status, reply.headers["access-control-allow-methods"]) == (204, "GET, POST")
    reply = ask(app, body=chat(), headers=page)
    assert reply.headers["access-control-allow-origin"] == "https://a.example"
    assert ask(app, body=chat(), headers={"origin": "https://b.example"}).status == 403


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("[::1]", True), ("[::1]:23333", True), ("127.0.0.1:", True), ("localhost.:1", True),
        ("[::1].evil.com", False), ("[::1]evil.com:80", False), ("127.0.0.1:80.evil.com", False),
        ("127.0.0.1:1:2", False), ("[127.0.0.1", False), ("localhost:evil", False),
    ],
)  # fmt: skip
async def test_what_begins_like_an_address_is_none(host: str, known: bool) -> None:
    app, _ = gateway(names={"m": "m"})
    reply = await call(app, "/health", method="GET", headers={"host": host})
    assert (reply.status != 421) is known


OWN = ("10.0.0.7:23333", "[fd00::7]", "gpu-box.local:23333", "lmdeploy-svc:23333", "svc.ns.svc",
       "web.ns.svc.cluster.local.", "nas.home.arpa", "gpu.lan", "a.internal", "a.test", "localhost",
       "LMDEPLOY-SVC")  # fmt: skip
FOREIGN = ("evil.example:23333", "127.0.0.1.nip.io")


@pytest.mark.parametrize("path", ["/", "/docs", "/about", "/about/", "/metrics"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_an_open_server_tells_of_its_use_under_no_name_that_others_can_own(
    path: str, method: str
) -> None:
    """A page whose own name leads here has that name as `Host`, and no `Origin`."""
    app, _ = gateway(names={"m": "m"}, host="0.0.0.0")
    for host in OWN:
        reply = await call(app, path, method=method, headers={"host": host})
        assert reply.status != 421, host
    for host in FOREIGN:
        reply = await call(app, path, method=method, headers={"host": host})
        assert (reply.status, "--allowed-hosts" in str(reply.json)) == (421, True), host
    for config in ({"api_key": ("k",)}, {"allowed_hosts": ("*",)}):
        app, _ = gateway(names={"m": "m"}, host="0.0.0.0", **config)
        reply = await call(app, path, method=method, headers={"host": FOREIGN[0]})
        assert reply.status != 421


async def test_what_programs_ask_of_an_open_server_passes_under_any_name() -> None:
    app, upstream = gateway(names={"m": "m"}, host="0.0.0.0")
    for host in ("lmdeploy-svc:23333", "gpu.example.com", "evil.example"):
        for path in ("/health", "/v1/models", "/v1/models/m"):
            assert (await call(app, path, method="GET", headers={"host": host})).status != 421
        assert (await call(app, CHAT, chat(), headers={"host": host})).status == 200
    assert len(upstream.seen) == 3


async def test_its_own_page_may_ask_and_another_one_may_not() -> None:
    """A page that let its own name lead here has that name as `Host` too."""
    for config, host, status in (
        ({}, "127.0.0.1:23333", 200),
        ({}, "localhost:23333", 200),
        ({"host": "0.0.0.0"}, "10.0.0.7:23333", 200),
        ({"host": "0.0.0.0"}, "lmdeploy-svc:23333", 200),
        ({"host": "0.0.0.0"}, "evil.example:23333", 403),
        ({"host": "0.0.0.0", "allowed_hosts": ("chat.example",)}, "chat.example", 200),
    ):
        app, _ = gateway(names={"m": "m"}, **config)
        headers = {"host": host, "origin": f"http://{host}"}
        assert (await call(app, CHAT, chat(), headers=headers)).status == status, host
        headers["origin"] = "http://evil.example"
        if "evil" not in host:
            assert (await call(app, CHAT, chat(), headers=headers)).status == 403
    app, _ = gateway(names={"m": "m"}, api_key=("k",))
    headers = {"host": "a.example", "origin": "https://a.example", "authorization": "Bearer k"}
    assert (await call(app, CHAT, chat(), headers=headers)).status == 200
