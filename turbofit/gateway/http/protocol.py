"""HTTP/1.1 by uvicorn and httptools, with limits and deadlines on what clients send.

httptools has no limits. uvicorn has only two limits: a deadline for idle connections, which ends
with the first byte, and a number of connections above which all clients are refused.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from turbofit.gateway.config import ConnectionLimits
from turbofit.gateway.http.connections import Connections, request_id
from turbofit.gateway.http.refusals import Api, Refusal, ending, refusal_body, refusal_event
from turbofit.gateway.http.routes import api_of

#: Bytes of a header in addition to its name and value: a colon, a space and the end of the line.
_AROUND: Final = 4


class _Pipelined(Exception):  # noqa: N818
    """A client sent a request before the answer to its previous request was complete."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection of a client, with limits and deadlines.

    ``_unclaimed`` counts the bytes since the last complete headers or part of a body: first the
    bytes of incomplete headers, later the bytes that are no body (chunk extensions, trailers).

    Requests are read one at a time. A request that comes before the end of the previous answer is
    not read, and the connection ends after that answer. uvicorn would queue any number of such
    requests.
    """

    def __init__(
        self, limits: ConnectionLimits, connections: Connections, *args: Any, **keywords: Any
    ) -> None:
        super().__init__(*args, **keywords)
        self.limits, self.all_connections = limits, connections
        #: The deadline of the client's next step.
        self._timer: asyncio.TimerHandle | None = None
        #: The deadline of a client that does not read its answer.
        self._stuck: asyncio.TimerHandle | None = None
        #: Whether a body is being received, and whether received bytes are dropped.
        self._in_body = self._deaf = False
        self._unclaimed = self._headers_size = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        refusal = self.all_connections.opened(self, self.client[0] if self.client else "")
        if refusal is not None:
            self._refuse(refusal)
        else:
            self._within(self.limits.headers_seconds, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self.all_connections.closed(self)
        self._no_deadline()
        self._writes()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes; refuse a malformed request, or headers that are too large."""
        if self._deaf:
            return
        self._unset_keepalive_if_required()
        self._unclaimed += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # the gateway answers the request without an upgrade
        except httptools.HttpParserError as exc:
            why = exc.__context__  # the error of one of the methods below
            if isinstance(why, _Pipelined):
                self._end_after_this()
            else:
                self._refuse(why if isinstance(why, Refusal) else Refusal("bad_request:http"))
            return
        if self._unclaimed > self.limits.all_headers_bytes:
            self._refuse(_headers_too_big(self._unclaimed, self.limits))
        elif not self._in_body and self._unclaimed and self._timer is None:
            self._within(self.limits.headers_seconds, self._late)

    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            raise _Pipelined
        super().on_message_begin()
        self.scope["turbofit.connection"] = self  # type: ignore[typeddict-unknown-key]
        self._headers_size = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        size = len(self.url)
        if size > self.limits.header_bytes:
            raise Refusal("url_too_long", size=size, most=self.limits.header_bytes)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Check the size of a header or a trailer (a header after the body); keep only headers.

        Raises:
            Refusal: the header is too large, or all headers are too large or too many.
        """
        limits, size = self.limits, len(name) + len(value) + _AROUND
        self._headers_size += size
        if size > limits.header_bytes:
            raise Refusal("header_too_big", size=size, most=limits.header_bytes)
        if len(self.headers) >= limits.headers:
            raise Refusal("too_many_headers", most=limits.headers)
        if self._headers_size + len(self.url) > limits.all_headers_bytes:
            raise _headers_too_big(self._headers_size + len(self.url), limits)
        if not self._in_body:
            # Trailers are counted and dropped: after the body they would replace headers.
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start a request; from now on the app sets its deadlines.

        A request with a body that asks for another protocol is refused: httptools would end the
        request after its headers, and read its body as a new request. Behind a proxy that shares
        connections, this new request could count as another client's.

        Raises:
            Refusal: a request with a body asks for another protocol, or servers and proxies read
                the headers differently.
        """
        lengths = [value for name, value in self.headers if name == b"content-length"]
        encodings = [value for name, value in self.headers if name == b"transfer-encoding"]
        # `int` cannot fail, since httptools accepts only digits as a length.
        if self.parser.should_upgrade() and (encodings or any(map(int, lengths))):
            raise Refusal("upgrade")
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (not hosts and self.parser.get_http_version() != "1.0"):
            raise Refusal("bad_request:host", count=hosts)
        # httptools accepts any encodings that end with ``chunked``, also a compressed body.
        if [value.strip().lower() for value in encodings] not in ([], [b"chunked"]):
            raise Refusal("bad_request:encoding")
        self._in_body = True
        self._unclaimed = 0
        self._no_deadline()
        self.all_connections.works(self)
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0":
            cycle: Any = self.cycle
            cycle.send = partial(_send_unchunked, cycle, cycle.send)

    def on_body(self, body: bytes) -> None:
        self._unclaimed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that the body is complete; if it was refused before, the connection is now idle."""
        self._in_body = False
        self._unclaimed = 0
        super().on_message_complete()
        if self.cycle.response_complete:
            self._no_deadline()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        """Note that the answer is complete; read the rest of an incomplete body for a while."""
        super().on_response_complete()
        self.all_connections.waits(self)
        if self.transport.is_closing():
            self._within(self.limits.unread_seconds, self.transport.abort)
        elif self._in_body:
            self._unset_keepalive_if_required()
            self._within(self.limits.unread_seconds, self._close)

    def pause_writing(self) -> None:
        """Start the deadline for a client that does not read its answer fast enough."""
        super().pause_writing()
        if self._stuck is None:

            def give_up() -> None:
                self.all_connections.count("connections_closed_total", "reason=unread")
                self.transport.abort()

            self._stuck = self.loop.call_later(self.limits.write_seconds, give_up)

    def resume_writing(self) -> None:
        self._writes()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def make_room(self) -> None:
        self._deaf = True
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def has_unread(self) -> bool:
        if self._deaf and self.transport.get_write_buffer_size():
            return True  # the last message is being sent
        socket = self.transport.get_extra_info("socket")
        if socket is None or socket.fileno() < 0:
            return False  # the connection is lost, but TLS has not noticed this yet
        poll = select.poll()
        poll.register(socket.fileno(), select.POLLIN)
        return any(event & select.POLLIN for _, event in poll.poll(0))

    def _late(self) -> None:
        """End the connection, since its headers are not complete in time."""
        self._timer = None
        if not self._unclaimed:  # the client never sent a request
            self.all_connections.count("connections_closed_total", "reason=idle")
            self._close()
            return
        self._refuse(Refusal("slow_headers", seconds=self.limits.headers_seconds))

    def cut(self) -> None:
        """Close the connection when the server ends; answer an open request with a last message.

        The app does not take part, and the server does not wait until the client has read the
        message.
        """
        cycle = self.cycle
        if self.transport.is_closing():
            return
        if cycle is None or cycle.response_complete:
            self._close()
            return
        self.all_connections.cut += 1
        if not cycle.response_started:
            self._last_words(self._answer(ending()))
        elif cycle.chunked_encoding:
            event = refusal_event(self._api, ending())
            self._last_words(b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event))
        else:
            self._close()
        if not self._in_body:  # else the client may still send, and would lose the message
            self._close()

    def _refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal and end the connection.

        While an earlier answer is still running, no refusal is sent, and the connection ends after
        that answer.
        """
        cycle = self.cycle
        answering = cycle is not None and not cycle.response_complete
        if answering and (cycle.response_started or not cycle.more_body):
            self._end_after_this()
            return
        self.all_connections.count("refused_total", f"reason={refusal.reason}")
        self._last_words(self._answer(refusal))

    def _last_words(self, words: bytes) -> None:
        """Write a last message without the app, then read and drop further bytes for a while.

        ``words`` is the whole message.
        """
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True  # to the app, the client has left
            cycle.message_event.set()
        self.all_connections.waits(self)
        self._deaf = True
        self.flow.resume_reading()
        self.transport.write(words)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._within(self.limits.unread_seconds, self.transport.abort)

    @property
    def _api(self) -> Api:
        return api_of(getattr(self, "url", b"").partition(b"?")[0])

    def _answer(self, refusal: Refusal) -> bytes:
        """Return a whole HTTP response with a refusal."""
        number = request_id(dict(self.headers or ()))
        body = refusal_body(self._api, refusal, number)
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)),
            (b"x-request-id", number.encode()), (b"connection", b"close"), *refusal.headers,
        ]  # fmt: skip
        lines = [b"%s: %s\r\n" % header for header in headers]
        phrase = HTTPStatus(refusal.status).phrase.encode()
        return b"".join([b"HTTP/1.1 %d %s\r\n" % (refusal.status, phrase), *lines, b"\r\n", body])

    def _end_after_this(self) -> None:
        """Read nothing more, and end the connection after the running answer."""
        self._deaf, self.cycle.keep_alive = True, False
        self._no_deadline()

    def _close(self) -> None:
        """Close the connection when the client has read the answer, or after ``unread_seconds``."""
        if not self.transport.is_closing():
            self.transport.close()
            self._within(self.limits.unread_seconds, self.transport.abort)

    def _within(self, seconds: float, act: Callable[[], None]) -> None:
        """Call ``act`` after ``seconds``, in place of an earlier deadline."""
        self._no_deadline()
        self._timer = self.loop.call_later(seconds, act)

    def _no_deadline(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _writes(self) -> None:
        """Cancel the deadline for reading an answer: the client reads again, or has gone."""
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None


async def _send_unchunked(cycle: Any, send: Callable[[Any], Any], message: Any) -> None:
    """Send a message of an HTTP/1.0 answer, without chunks.

    If the length of the answer is unknown, the end of the connection marks the end of the answer.
    Then uvicorn must not compare a part of the answer with an expected length.
    """
    if message["type"] == "http.response.start":
        names = {name.lower() for name, _ in message.get("headers", ())}
        if b"content-length" not in names:
            cycle.chunked_encoding = False
    elif not cycle.expected_content_length:
        cycle.expected_content_length = len(message.get("body", b""))
    await send(message)


def _headers_too_big(size: int, limits: ConnectionLimits) -> Refusal:
    return Refusal("headers_too_big", size=size, most=limits.all_headers_bytes)
