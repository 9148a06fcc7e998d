"""Who may ask: keys, names of the server, and web pages."""

from __future__ import annotations

import hmac
import socket
from contextlib import nullcontext
from pathlib import Path

import pytest

from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http import access
from turbofit.gateway.http.access import Hosts, Keys, Origins
from turbofit.gateway.http.refusals import Refusal


@pytest.mark.parametrize("given", [b"first", b"second", b"neither"])
def test_the_time_of_an_answer_tells_nothing_of_a_key(
    given: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each key's hash is compared in constant time, also after one was equal."""
    compared, compare = [], hmac.compare_digest

    def noted(given_key: bytes, other: bytes) -> bool:
        compared.append(other)
        return compare(given_key, other)

    keys = Keys(("first", "second"))
    monkeypatch.setattr(hmac, "compare_digest", noted)
    with pytest.raises(Refusal) if given == b"neither" else nullcontext():
        assert keys.check({b"x-api-key": given})[0]
    assert len(set(compared)) == 2
    assert not {b"first", b"second"} & {*compared}


@pytest.mark.parametrize(
    ("requested_header", "echo"),
    [
        (b"Content-Type, x-stainless-lang", True), (b"", False), (b"a\r\nset-cookie: b", False),
        (b"*", False), (b"x," * 2000 + b"x", False),
    ],
)  # fmt: skip
def test_a_page_may_send_the_headers_that_its_sdk_adds(requested_header: bytes, echo: bool) -> None:
    page = "https://chat.example"
    headers = {b"origin": page.encode(), b"access-control-request-headers": requested_header}
    allowed = dict(Origins((page,), Hosts(GatewayConfig())).preflight(headers))[
        b"access-control-allow-headers"
    ]
    assert allowed == (requested_header if echo else b"")


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("localhost", True), ("LOCALHOST:23333", True),
        ("app.localhost.", True), ("[::1]:80", True),
        ("192.168.1.7:8000", True), ("127.0.0.1", True), (socket.gethostname(), True),
        ("host.docker.internal:8000", True), ("[fe80::1%25eth0]:80", True), ("internal.com", False),
        ("evil.example", False), ("evil.example:23333", False), ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False), ("", False), ("notlocalhost", False),
    ],
)  # fmt: skip
def test_only_names_of_the_server_are_its_own_where_nobody_needs_a_key(name, safe) -> None:
    headers = {b"host": name.encode()}
    with nullcontext() if safe else pytest.raises(Refusal, match="--allowed-hosts"):
        Hosts(GatewayConfig()).check(headers)
    for config in (
        GatewayConfig(allowed_hosts=("*",)), GatewayConfig(api_key=("k",)),
        GatewayConfig(host="0.0.0.0"), GatewayConfig(front_keys=("k",)),
    ):  # fmt: skip
        Hosts(config).check(headers)
    named = GatewayConfig(host="0.0.0.0", api_key=("k",), allowed_hosts=("chat.example",))
    with nullcontext() if safe else pytest.raises(Refusal):
        Hosts(named).check(headers)
    Hosts(named).check({b"host": b"chat.example:443"})
    Hosts(named).check({})


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("lmdeploy-svc:23333", True), ("LMDEPLOY_SVC", True), ("box.local", True),
        ("box.lan.", True), ("svc.ns.svc", True), ("svc.ns.svc.cluster.local:80", True),
        ("nas.home.arpa", True), ("a.internal", True), ("a.test", True), ("10.0.0.7", True),
        ("gpu-7.cards.example", True), ("gpu-7.lab.example", True), ("gpu-7", True),
        ("evil.example", False), ("127.0.0.1.nip.io", False), ("lan.evil.example", False),
        ("", False), ("a b", False), ("[::1", False), ("x.notlocal", False), ("home.arpa", False),
        ("gpu-7.evil.example", False),
    ],
)  # fmt: skip
def test_names_that_nobody_outside_can_own(
    name: str, own: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A page of such a name is of the machine's own network; others may be rebound."""
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-7")
    for file, text in {
        "hosts": "127.0.0.1 localhost\n127.0.1.1 gpu-7.cards.example gpu-7 # this one\n",
        "resolv.conf": "nameserver 10.0.0.1\nsearch lab.example\n",
    }.items():
        (tmp_path / file).write_text(text)
    monkeypatch.setattr(access, "_NAME_FILES", (tmp_path / "hosts", tmp_path / "resolv.conf"))
    hosts, headers = Hosts(GatewayConfig(host="0.0.0.0")), {b"host": name.encode()}
    hosts.check(headers)
    with nullcontext() if own else pytest.raises(Refusal, match="--allowed-hosts"):
        hosts.check(headers, tells_of_use=True)


def test_a_machine_without_these_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(access, "_NAME_FILES", (tmp_path / "none", tmp_path))
    Hosts(GatewayConfig(host="0.0.0.0")).check({b"host": b"localhost"}, tells_of_use=True)
