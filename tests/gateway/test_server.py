"""The gateway on real sockets, alone and beside a supervisor, and the memory of its process."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import closing
from pathlib import Path

import pytest
from aiohttp import web

from tests.measure.load.scripted import ThreadedServer
from tests.support.gateway import CHAT, chat, image_part, plan_for
from tests.support.waiting import HANG
from turbofit.core.errors import LaunchError, UsageError
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http.uvicorn_server import bind
from turbofit.gateway.server import GatewayThread
from turbofit.serving.access_log import AccessLog
from turbofit.serving.plan_gateway import make_gateway


class Engine(ThreadedServer):
    """Answers each request with three events or in short, and keeps what was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.left = threading.Event()
        self.headers: list[dict[str, str]] = []
        #: A stream stops after three events, and each further one needs a permit.
        self.permits = asyncio.Semaphore(0)

    def permit(self) -> None:
        self._loop.call_soon_threadsafe(self.permits.release)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.headers.append(dict(request.headers))
        self.bodies.append(body)
        if not body.get("stream"):
            return web.json_response({"choices": [{}]})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            for number in range(body.get("max_tokens", 3)):
                if number >= 3:
                    await self.permits.acquire()
                await response.write(b"data: {}\n\n")
        except (asyncio.CancelledError, ConnectionError):
            self.left.set()
            raise
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
def engine():
    with Engine() as server:
        yield server


@pytest.fixture
def served(engine):
    with GatewayThread(make_gateway(plan_for(), [engine.url], config())) as gateway:
        yield gateway


def config(**changes) -> GatewayConfig:
    return GatewayConfig(port=0, **changes)


def connected(url: str, context=None) -> http.client.HTTPConnection:
    scheme, _, host = url.partition("://")
    if scheme == "https":
        return http.client.HTTPSConnection(host, timeout=HANG, context=context)
    return http.client.HTTPConnection(host, timeout=HANG)


def asked(url: str, body=None, path=CHAT, context=None, **headers: str):
    """Status, headers and body, over a fresh connection."""
    sent = {"content-type": "application/json", **headers}
    with closing(connected(url, context)) as client:
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
        client.request(method, path, data, sent)
        response = client.getresponse()
        return response.status, dict(response.getheaders()), response.read()


def test_requests_pass_and_health_follows(engine) -> None:
    config_ = config(upstream_key="inner")
    with GatewayThread(make_gateway(plan_for(), [engine.url], config_, overlay=False)) as gateway:
        status, headers, body = asked(gateway.url, chat(image_part(1792, 1344, detail="high")))
        assert (status, json.loads(body)) == (200, {"choices": [{}]})
        assert headers["x-turbofit-limited"] == "detail=high->12"
        assert engine.headers[-1]["Authorization"] == "Bearer inner"
        status, _, body = asked(gateway.url, chat(stream=True))
        assert body == b"data: {}\n\n" * 3 + b"data: [DONE]\n\n"
        assert asked(gateway.url, path="/health")[0] == 200
        assert asked(gateway.url, path="/v1/models")[2] == b'{"data": [{"id": "m"}]}'
        assert asked(gateway.url, {}, path="/update_weights")[0] == 403
        engine.close()
        status, headers, _ = asked(gateway.url, chat())
        assert status == 503
        assert "retry-after" in headers
        assert asked(gateway.url, path="/health")[0] == 503
    assert not gateway.alive


def streamed(url: str) -> http.client.HTTPResponse:
    """The answer to a request for eight events, of which the engine sends three by itself."""
    connection, body = connected(url), json.dumps(chat(stream=True, max_tokens=8))
    connection.request("POST", CHAT, body, {"content-type": "application/json"})
    return connection.getresponse()


def test_chunks_arrive_as_they_are_sent(engine, served) -> None:
    with streamed(served.url) as response:
        for number in range(8):
            if number >= 3:
                engine.permit()
            assert (response.readline(), response.readline()) == (b"data: {}\n", b"\n")
        assert response.readline() == b"data: [DONE]\n"


def certificate(folder: Path, address: str) -> dict[str, str]:
    """A certificate for an address and its key: the options that name them."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    files = {"ssl_certfile": str(folder / address), "ssl_keyfile": str(folder / f"{address}.key")}
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj",
         "/CN=x", "-addext", f"subjectAltName=IP:{address}", "-keyout", files["ssl_keyfile"],
         "-out", files["ssl_certfile"]],
        check=True, capture_output=True,
    )  # fmt: skip
    return files


def test_the_address_of_a_server_on_every_address_can_be_asked(engine) -> None:
    open_to_all = GatewayConfig(host="0.0.0.0", port=0, api_key=("k",))
    with GatewayThread(make_gateway(plan_for(), [engine.url], open_to_all)) as gateway:
        assert gateway.url.startswith("http://127.0.0.1:")
        assert asked(gateway.url, path="/health")[0] in (200, 503)  # it is reached


def test_what_a_busy_gateway_was_asked_too_late_is_not_done_later(served) -> None:
    free, done = threading.Event(), []
    served._loop.call_soon_threadsafe(free.wait, HANG)
    with pytest.raises(LaunchError, match="did not answer"):
        served.call(done.append, 0.05)
    free.set()
    assert served.call(lambda _: done.copy()) == []


def test_tls(engine, tmp_path) -> None:
    files = certificate(tmp_path, "127.0.0.1")
    context = ssl.create_default_context(cafile=files["ssl_certfile"])
    with GatewayThread(make_gateway(plan_for(), [engine.url], config(**files))) as gateway:
        assert gateway.url.startswith("https://")
        assert asked(gateway.url, chat(), context=context)[0] == 200


def test_an_upstream_is_an_address() -> None:
    for urls in ([], ["localhost:1"]):
        with pytest.raises(UsageError, match="no address"):
            make_gateway(plan_for(), urls, config())


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that is slow to end has not failed to."""
    monkeypatch.setattr("turbofit.gateway.server._BEYOND", HANG)


def thread(log: AccessLog | None = None, **settings: object) -> GatewayThread:
    config = GatewayConfig(port=0, upstream_key="k", drain_seconds=1.0)
    config = config.changed(**settings)
    return GatewayThread(make_gateway(plan_for(), ["http://127.0.0.1:9"], config, log=log))


@pytest.mark.parametrize("pretend", [True, False])
def test_pretend_is_said_and_only_where_it_is_true(pretend: bool, tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "access.log")
    with thread(log, pretend=pretend) as gateway:
        status, headers, body = asked(gateway.url, path="/health")
        assert status == 503
        assert headers.get("x-turbofit-pretend") == ("1" if pretend else None)
        assert json.loads(body).get("pretend") is (True if pretend else None)
    assert not gateway.alive
    (line,) = (tmp_path / "access.log").read_text().splitlines()
    assert json.loads(line)["status"] == 503


def test_what_is_in_the_way_is_raised_where_it_was_started(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match="cannot be bound"):
            bind(GatewayConfig(port=port))
        gateway_thread = thread(port=port)
        with pytest.raises(LaunchError, match="cannot be bound"):
            gateway_thread.start()
        gateway_thread.stop(drain=False)
    nothing = str(tmp_path / "none.pem")
    with pytest.raises(UsageError, match="certificate"):
        thread(ssl_certfile=nothing, ssl_keyfile=nothing).start()
