"""What strangers send over real sockets: what is answered or refused, what ends a connection."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import select
import socket
import threading
from contextlib import closing, contextmanager, suppress
from copy import copy
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest
import uvicorn
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from tests.hostile import hostile
from tests.support.gateway import CHAT, Recorder, chat, gateway, plan_for, stream
from tests.support.waiting import HANG, until
from turbofit.gateway.config import ConnectionLimits, GatewayConfig
from turbofit.gateway.http.app import Gateway
from turbofit.gateway.http.protocol import LimitedProtocol
from turbofit.gateway.http.uvicorn_server import uvicorn_server
from turbofit.gateway.server import GatewayThread
from turbofit.serving.plan_gateway import bounds_of

HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n".encode()
#: Deadlines that no test waits for.
LONG = {"headers_seconds": 1000.0, "unread_seconds": 1000.0}


HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
BODY = json.dumps(chat()).encode()
WHOLE = HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY


@contextmanager
def serving(limits=None, room: int = 0, log=None, **config):
    """A gateway on a port of its own; what is asked of it is answered at once."""
    settings = GatewayConfig(port=0, connection=ConnectionLimits(**(limits or {})), **config)
    app = Gateway(bounds_of(plan_for()), ["http://127.0.0.1:9"], settings, log, None, Recorder())
    app.engines[0].last_success = 0.0  # so that /health is 200 before the first probe
    app._bodies._room = room or app._bodies._room
    with GatewayThread(app) as thread:
        thread.app, thread.port = app, int(thread.url.rpartition(":")[2])
        yield thread


@contextmanager
def conversation(limits=None, sent: bytes = b"", **config):
    """Such a gateway and a client that has sent this."""
    with serving(limits or LONG, **config) as gateway, closing(connected(gateway)) as client:
        client.sendall(sent)
        yield gateway, client


def connected(gateway, source: str = "127.0.0.1") -> socket.socket:
    address = ("127.0.0.1", gateway.port)
    return socket.create_connection(address, timeout=HANG, source_address=(source, 0))


def answered(client: socket.socket) -> tuple[int, dict[str, str], dict]:
    response = HTTPResponse(client)
    response.begin()
    body = response.read()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return response.status, headers, json.loads(body)


def ended(client: socket.socket) -> bool:
    """Waits for the other end's close."""
    try:
        return client.recv(1) == b""
    except ConnectionError:
        return True


def health(gateway) -> int:
    with closing(connected(gateway)) as client:
        client.sendall(HEALTH)
        return answered(client)[0]


def asked(gateway, key: str = "", source: str = "127.0.0.1", **headers: str) -> int:
    connection = HTTPConnection("127.0.0.1", gateway.port, HANG, source_address=(source, 0))
    sent = {"content-type": "application/json", "authorization": f"Bearer {key}", **headers}
    with closing(connection):
        connection.request("POST", CHAT, BODY, sent)
        return connection.getresponse().status


def send(client: socket.socket, data: bytes, *, again: bool = False) -> None:
    """Send until nobody takes it any more."""
    with suppress(OSError):
        client.sendall(data)
        while again:
            client.sendall(data)


CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (HEAD + b"x: " + b"a" * 20_000 + b"\r\n\r\n", 431, "header_too_big"),
        (HEAD + b"x: " + b"a" * (5 << 20) + b"\r\n\r\n", 431, "header"),
        (HEAD + b"".join(b"x-%d: a\r\n" % n for n in range(5000)), 431, "too_many_headers"),
        (HEAD + (b"x: " + b"a" * 16_000 + b"\r\n") * 5, 431, "headers_too_big"),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n", 414, "url_too_long"),
        (b"GET /a b c HTTP/1.1\r\n\r\n", 400, "bad_request"),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400, "bad_request"),
        (CHUNKED + b"zz\r\n", 400, "bad_request"),
        (CHUNKED + b"1\r\n{\r\n0\r\nx: " + b"a" * (1 << 20), 431, "headers_too_big"),
        (CHUNKED + b"1;" + b"a" * (1 << 20), 431, "headers_too_big"),
    ],
)
def test_what_is_too_big_or_no_http_is_answered_and_the_connection_ends(sent, status, code) -> None:
    with conversation() as (gateway, client):
        threading.Thread(target=send, args=(client, sent), daemon=True).start()
        answered_status, headers, body = answered(client)
        assert (answered_status, headers["connection"]) == (status, "close")
        assert body["error"]["code"].startswith(code)
        assert headers["x-request-id"]
        assert ended(client)
        assert health(gateway) == 200
        page = gateway.app.metrics.text({})
        assert f'turbofit_gateway_refused_total{{reason="{body["error"]["code"]}"}} 1' in page


def test_the_error_has_the_form_of_the_api_that_was_asked() -> None:
    sent = b"POST /v1/messages HTTP/1.1\r\nx: " + b"a" * 20_000 + b"\r\ny: b"
    with conversation(sent=sent, pretend=True) as (_, client):
        status, headers, body = answered(client)
    assert (status, body["type"], headers["x-turbofit-pretend"]) == (431, "error", "1")
    assert "the limit is 16384" in body["error"]["message"]


def test_headers_below_the_limits_and_bodies_in_small_pieces_pass() -> None:
    lines = b"".join(b"x-%d: %s\r\n" % (n, b"a" * 600) for n in range(99))
    with conversation(sent=HEALTH[:-2] + lines[: lines.index(b"x-98:")]) as (_, client):
        client.sendall(b"x: " + b"a" * 4000 + b"\r\n\r\n")
        assert answered(client)[0] == 200
        for letter in WHOLE:
            client.sendall(bytes([letter]))
        assert answered(client)[0] == 200


@pytest.mark.parametrize("sent", [b"", b"\r\n\r\n", b"PO", HEAD, HEAD + b"x: a"])
def test_headers_that_are_not_whole_in_time(sent) -> None:
    limits = {"headers_seconds": 0.05, "unread_seconds": 0.05}
    with conversation(limits, sent) as (_, client):
        if sent:
            status, headers, body = answered(client)
            assert (status, headers["connection"]) == (408, "close")
            assert body["error"]["code"] == "slow_headers"
        assert ended(client)


def test_a_later_request_has_the_same_deadline_and_idle_connections_end() -> None:
    quick = ConnectionLimits(headers_seconds=0.05)
    with conversation({"keep_alive_seconds": 1}, HEALTH) as (gateway, client):
        assert answered(client)[0] == 200
        with closing(connected(gateway)) as later:
            later.sendall(HEALTH)
            assert answered(later)[0] == 200
            for connection in gateway.call(lambda app: list(app.connections._of)):
                connection.limits = quick
            later.sendall(b"GET /health HTTP/1.1\r\nx: ")
            assert answered(later)[0] == 408
            assert ended(later)
        assert ended(client)


def test_the_key_is_looked_at_before_the_body_and_the_rest_is_read_for_a_while() -> None:
    big = HEAD + b"content-length: 100000000000\r\nauthorization: Bearer k\r\n\r\n"
    with conversation(
        {"unread_seconds": 0.1}, HEAD + b"content-length: 10000000\r\n\r\n{", api_key=("k",)
    ) as (gateway, client):
        assert answered(client)[0] == 401
        send(client, b" " * 1000, again=True)  # until the connection ends
        with closing(connected(gateway)) as other:
            other.sendall(big)
            assert answered(other)[0] == 413
            assert ended(other)


def test_a_refused_body_that_comes_whole_leaves_the_connection_usable() -> None:
    refused = HEAD + b"content-length: 1000000\r\n\r\n"
    with conversation(sent=refused, api_key=("k",)) as (_, client):
        assert answered(client)[0] == 401
        client.sendall(b" " * 1_000_000 + HEALTH)
        assert answered(client)[0] == 200


@pytest.mark.parametrize("other", [{"key": "b"}, {"key": "a", "source": "127.0.0.2"}])
def test_nine_unfinished_bodies_lock_no_other_client_out(other) -> None:
    keys = ("a", "b") if other["key"] == "b" else ()
    config = {"room": 1 << 20, "api_key": keys, "body_window_seconds": 1000.0}
    with serving(LONG, **config, body_seconds=1000.0) as gateway:
        posting = HEAD + b"authorization: Bearer a\r\ncontent-length: 200000\r\n\r\n"
        clients = [connected(gateway) for _ in range(9)]
        for client in clients:
            client.sendall(posting + b" " * 150_000)
            assert asked(gateway, **other) == 200
        # Three are within half of the room; the others are told so.
        statuses, waiting = [], list(clients)
        while len(statuses) < 6:
            ready, _, _ = select.select(waiting, [], [], HANG)
            assert ready
            statuses += [answered(client)[0] for client in ready]
            waiting = [client for client in waiting if client not in ready]
        assert set(statuses) == {429}
        assert asked(gateway, **other) == 200
        assert gateway.call(lambda app: app._bodies.in_memory) <= 1 << 19
        for client in clients:
            client.close()


def test_requests_are_taken_one_at_a_time() -> None:
    with conversation(sent=WHOLE * 50) as (gateway, client):
        status, headers, _ = answered(client)
        assert (status, headers["connection"]) == (200, "close")
        assert ended(client)
        assert len(gateway.app._upstream.seen) == 1


def test_many_half_open_connections_leave_health_alone() -> None:
    """A small twin of a row of ``bench/gateway/RESULTS.md``: connections that send slowly."""
    with serving({**LONG, "connections": 50, "connections_per_address": 40}) as gateway:
        half = [connected(gateway, f"127.0.0.{2 + n % 4}") for n in range(200)]
        for client in half:
            send(client, HEAD + b"x: a\r\n")
        # A connection whose bytes the server has not read yet makes no room.
        until(lambda: health(gateway) == 200, "the burst to be read")
        for _ in range(5):
            assert health(gateway) == 200
            assert asked(gateway) == 200
        # 50, and those of the burst that were refused and have not read so.
        assert gateway.call(lambda app: len(app.connections)) <= 50 + 128
        for client in half:
            client.close()


def test_behind_a_trusted_proxy_the_client_is_who_the_proxy_says() -> None:
    records, limits = [], {"connections_per_address": 1}
    forwarded = {"x-forwarded-for": "1.2.3.4, 192.0.2.7"}
    with serving(limits, log=records.append, trusted_proxies=("127.0.0.1",)) as gateway:
        idle = [connected(gateway) for _ in range(3)]
        for source in ("127.0.0.1", "127.0.0.2"):
            assert asked(gateway, source=source, **forwarded) == 200
        for client in idle:
            client.setblocking(False)
            with pytest.raises(BlockingIOError):  # still open
                client.recv(1)
            client.close()
    assert [record["client"] for record in records] == ["192.0.2.7", "127.0.0.2"]


UPGRADE = HEAD + b"connection: upgrade\r\nupgrade: h2c\r\n"


@pytest.mark.parametrize(
    ("framed", "body"),
    [
        (b"content-length: %d\r\n\r\n" % len(HEALTH), HEALTH),
        (b"transfer-encoding: chunked\r\n\r\n", b"%x\r\n%b\r\n0\r\n\r\n" % (len(HEALTH), HEALTH)),
    ],
)
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_body_beside_an_upgrade_is_never_taken_for_the_next_request(framed, body, pieces) -> None:
    """httptools ends such a message with its headers: what follows would be requests."""
    with conversation(sent=UPGRADE + framed + body * (pieces == 1)) as (gateway, client):
        status, headers, document = answered(client)
        assert (status, document["error"]["code"]) == (400, "upgrade")
        assert headers["connection"] == "close"
        client.sendall(body)
        assert ended(client)
        assert gateway.app._upstream.seen == []


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\n\r\n",
        HEALTH.replace(b"host", b"host: localhost\r\nhost"),
        CHUNKED.replace(b"chunked", b"gzip, chunked") + b"0\r\n\r\n",
        CHUNKED.replace(b"chunked", b"gzip\r\ntransfer-encoding: chunked") + b"0\r\n\r\n",
    ],
)
def test_what_servers_read_differently_is_refused(head) -> None:
    with conversation(sent=head) as (gateway, client):
        status, _, body = answered(client)
        assert (status, body["error"]["code"]) == (400, "bad_request")
        assert ended(client)
        with closing(connected(gateway)) as old:
            old.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert answered(old)[0] == 200


@pytest.mark.parametrize("framed", [b"", b"content-length: 0\r\n"])
def test_an_upgrade_without_a_body_is_served_as_it_is(framed) -> None:
    """Java's client asks for HTTP/2 at each request, before Java 19 with a length of 0."""
    with conversation() as (_, client):
        for _ in range(2):
            client.sendall(HEALTH[:-2] + framed + b"connection: upgrade\r\nupgrade: h2c\r\n\r\n")
            assert answered(client)[0] == 200


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_stream_to_http_1_0_has_no_chunks(version: str) -> None:
    body = json.dumps(chat(stream=True)).encode()
    head = HEAD.replace(b"HTTP/1.1", f"HTTP/{version}".encode())
    sent = head + b"content-length: %d\r\n\r\n" % len(body) + body
    with conversation() as (gateway, client):
        gateway.app._upstream.answer = lambda *_: stream(b"data: 1\n\n", b"data: [DONE]\n\n")
        client.sendall(sent)
        response = HTTPResponse(client)
        response.begin()
        assert response.chunked == (version == "1.1")
        assert (response.read(9), response.read()) == (b"data: 1\n\n", b"data: [DONE]\n\n")
        assert response.will_close == (version == "1.0")


def test_trailers_are_no_headers() -> None:
    sent = CHUNKED.replace(b"host: localhost", b"host: localhost\r\nx-request-id: of-a-header")
    trailers = b"content-type: text/plain\r\nx-request-id: of-a-trailer\r\n\r\n"
    sent += b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY) + trailers
    with conversation(sent=sent) as (_, client):
        status, headers, _ = answered(client)
        assert (status, headers["x-request-id"]) == (200, "of-a-header")


#: Turns of the loop after which nobody has anything to do but to wait for more.
TURNS = 40


class Wire(asyncio.Transport):
    """A transport into nothing, which remembers what was written."""

    def __init__(self) -> None:
        super().__init__({"peername": ("10.0.0.9", 1), "sockname": ("10.0.0.1", 2)})
        self.written, self.closed = bytearray(), False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def can_write_eof(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return 0

    def write_eof(self) -> None: ...

    pause_reading = resume_reading = write_eof


@hostile("connections")
def test_nothing_breaks_and_nothing_is_left(data: bytes) -> None:
    bugs: list[dict[str, Any]] = []
    asyncio.run(spoken(data, bugs))
    assert bugs == []


async def spoken(data: bytes, bugs: list[dict[str, Any]]) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: bugs.append(context))
    app, _ = gateway(api_key=("k",), trusted_proxies=("10.0.0.9",))
    others = asyncio.all_tasks()
    config = copy(uvicorn_server(app, lambda: None).config)
    config.loaded_app = ProxyHeadersMiddleware(app, ["10.0.0.9"])
    own = (app.config.connection, app.connections)
    protocol, wire = LimitedProtocol(*own, config, ServerState(), {}, loop), Wire()
    protocol.connection_made(wire)
    for piece in data.split(b"|~|"):
        if not piece or wire.closed:
            break
        protocol.data_received(piece)
        await settled()
    await settled()
    protocol.connection_lost(None)
    await settled()
    for line in bytes(wire.written).split(b"\r\n"):
        assert not line.startswith(b"HTTP/1.1 5") or line[9:12] == b"503", line
    left = asyncio.all_tasks() - others
    for task in left:
        task.cancel()
    assert not left, left
    assert app._bodies.in_memory == 0
    assert all(engine.gate.counted == engine.host_bytes == 0 for engine in app.engines)
    assert not len(app.connections)


#: What uvicorn calls or reads, and the limits override or set.
SHARED = (
    "on_response_complete", "pause_writing", "resume_writing", "timeout_keep_alive",
    "timeout_keep_alive_handler", "timeout_keep_alive_task",
)  # fmt: skip


def test_uvicorn_still_has_what_the_limits_rest_on() -> None:
    """Its protocol is not documented: this says at once what a new release has moved."""
    tree = ast.parse(inspect.getsource(LimitedProtocol))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    own |= {node.attr for node in names if isinstance(node.ctx, ast.Store)}

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    async def moved() -> set[str]:
        base = HttpToolsProtocol(uvicorn.Config(app, ws="none"), ServerState(), {})
        base.connection_made(Wire())
        base.data_received(HEALTH)
        await settled()
        theirs = {"self": base, "super()": base, "cycle": base.cycle, "self.cycle": base.cycle}
        used = {(ast.unparse(node.value), node.attr) for node in names}
        used = {(of, name) for of, name in used if of != "self" or name not in own}
        used |= {("self", name) for name in SHARED}
        return {
            f"{of}.{name}" for of, name in used if of in theirs and not hasattr(theirs[of], name)
        }

    assert asyncio.run(moved()) == set()
    assert list(inspect.signature(uvicorn.Server.startup).parameters) == ["self", "sockets"]
    assert hasattr(uvicorn.Server, "capture_signals")


async def settled() -> None:
    for _ in range(TURNS):
        await asyncio.sleep(0)
