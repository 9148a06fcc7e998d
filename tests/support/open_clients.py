"""An engine that never ends an answer, and clients in the middle of a request, on sockets."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from contextlib import suppress
from http.client import HTTPResponse, parse_headers
from io import BytesIO
from typing import Any

from tests.support.waiting import HANG

EVENTS = {
    "/v1/messages": b"event: content_block_delta\ndata: {}\n\n",
    "/v1/responses": b"event: response.output_text.delta\ndata: {}\n\n",
}


class EndlessEngine(socketserver.ThreadingTCPServer):
    """Answers probes; of a stream it sends two events, or events for ever, and of others nothing.

    What it does is in ``seed``, which the gateway passes on: 1 sends for ever.
    """

    daemon_threads = allow_reuse_address = True
    request_queue_size = 1024

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Exchange)
        self.began = threading.Semaphore(0)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """A client that went away."""

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Exchange(socketserver.StreamRequestHandler):
    server: EndlessEngine

    def handle(self) -> None:
        while line := self.rfile.readline():
            method, path, _ = line.decode().split()
            body = self.rfile.read(int(parse_headers(self.rfile).get("content-length", 0)))
            document = json.loads(body) if body else {}
            if method == "GET" or document.get("max_tokens") == 1:
                self._whole({"data": [{"id": "m"}], "choices": [{}]})
                continue
            self.server.began.release()
            if document.get("stream"):
                self._stream(EVENTS.get(path, b"data: {}\n\n"), document.get("seed") == 1)
            threading.Event().wait()  # until the process ends

    def _whole(self, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.wfile.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (len(body), body)
        )

    def _stream(self, event: bytes, endless: bool) -> None:
        self.wfile.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
            b"\r\n"
        )
        more = event * (5000 if endless else 1)
        while True:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(more), more))
            if not endless:
                return


class OpenClient:
    """One connection, whose answer is read in a thread until the server closes it.

    Args:
        url: of the server.
        path: what is asked for.
        body: sent as JSON.
        sent: how much of the request is sent; the rest is not, or dripped with ``drips``.
        reads: whether it reads at all before `answer` is asked for.
    """

    def __init__(
        self,
        url: str,
        path: str,
        body: dict[str, Any],
        *,
        sent: float = 1.0,
        drips: bool = False,
        reads: bool = True,
    ) -> None:
        host, _, port = url.rpartition("//")[2].partition(":")
        self.received, self._news, self.reset = b"", threading.Condition(), False
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\nanthropic-version: 2023-06-01\r\n"
            f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        ).encode()
        self._socket = socket.socket()
        if not reads:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.connect((host, int(port)))
        first = int(len(data) * sent)
        self._socket.sendall(head + data[:first])
        self._reader = threading.Thread(target=self._read, daemon=True)
        if reads:
            self._reader.start()
        if drips:
            threading.Thread(target=self._drip, args=(data[first:],), daemon=True).start()

    def _read(self) -> None:
        try:
            while data := self._socket.recv(1 << 16):
                with self._news:
                    self.received += data
                    self._news.notify_all()
        except OSError:
            self.reset = True

    def _drip(self, rest: bytes) -> None:
        with suppress(OSError):
            for number in range(len(rest)):
                self._socket.sendall(rest[number : number + 1])
                threading.Event().wait(0.002)

    def wait_for(self, text: bytes) -> None:
        """Until this was received."""
        with self._news:
            assert self._news.wait_for(lambda: text in self.received, HANG), self.received

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body, once the server has closed the connection."""
        if not self._reader.ident:
            self._reader.start()
        self._reader.join(HANG)
        assert not self._reader.is_alive(), self.received
        response = HTTPResponse(_Given(self.received))  # type: ignore[arg-type]
        response.begin()
        body = response.read()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, body

    def close(self) -> None:
        """Leave."""
        self._socket.close()


def refuses(url: str) -> bool:
    """Whether nobody listens there any more."""
    host, _, port = url.rpartition("//")[2].partition(":")
    with socket.socket() as one:
        return one.connect_ex((host, int(port))) != 0


class _Given:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, *_: object) -> BytesIO:
        return BytesIO(self._data)
