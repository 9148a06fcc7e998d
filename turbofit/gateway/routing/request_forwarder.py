"""Sends a prepared request to an engine, or to another engine if it cannot be reached."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import aiohttp
import msgspec

from turbofit.core.messages import EXCHANGE
from turbofit.gateway.first_tokens import FirstTokens
from turbofit.gateway.http.body import Bodies
from turbofit.gateway.http.metrics import Metrics
from turbofit.gateway.http.refusals import Refusal, refusal_body, refusal_event, refusal_of_engine
from turbofit.gateway.http.request_context import (
    OF_NODES,
    RequestContext,
    Send,
    sent_headers,
    uncancel,
)
from turbofit.gateway.routing.admission import Admission, Place
from turbofit.gateway.routing.conversations import Conversation, conversation_of
from turbofit.gateway.routing.dear_steps import note_said
from turbofit.gateway.routing.deny_list import DenyList
from turbofit.gateway.routing.engines import LEFT_SECONDS, Fleet, Present, RoutedEngine
from turbofit.gateway.upstream import Died, Unreachable, Upstream

HeaderList = list[tuple[bytes, bytes]]

#: The most engines that are tried for a request, since each unreachable engine may take a timeout.
_MOST_ENGINES: Final = 16
#: The most seconds for which a suspect waits until the other answers of its engine have begun.
_LONGEST_WAIT: Final = 30.0
_LARGEST_ANSWER: Final = 64 << 20
#: An event of more bytes is passed on in pieces: one event may have the routed experts of a whole
#: answer, and the search for its end would begin anew with each part.
_LONGEST_EVENT: Final = 1 << 20
_RETRY_DIED: Final = 5
#: The first bytes of a stream that only reports an error.
_ERROR_EVENTS: Final = (b'data: {"error"', b"event: error")
#: The message of LMDeploy's server after the end of its engine's loop, with status 503 or in an
#: event. LMDeploy sends the message also for a lost session or queue; then the engine still works,
#: and answers the next probe. lmdeploy core/exceptions.py::ERROR_MESSAGES #3b7494
_UNAVAILABLE: Final = b"The inference engine is unavailable."
#: An event whose error has exactly this message. Text of a model or a client cannot look like this
#: event, since quotes inside a text are escaped.
_UNAVAILABLE_EVENT: Final = re.compile(
    rb'(?:\A|(?<=\n\n))(?:event: [\w.]+\n)?data: \{[^\n]*?"error": ?\{[^{}\n]*"message": ?"'
    + re.escape(_UNAVAILABLE)
    + b'"'
)
#: Events of the Responses API with output of the engine, and events that report an error. For its
#: other events LMDeploy's server does not need the engine.
_GENERATED: Final = re.compile(
    rb"(?:\A|\n\n)event: response\.[\w.]*(?:delta|completed|incomplete)\n"
)
_FAILED: Final = re.compile(rb"(?:\A|\n\n)event: (?:error|response\.failed)\n")


class Exchange:
    """The exchange of one request with one engine."""

    def __init__(
        self,
        forwarder: RequestForwarder,
        request: RequestContext,
        present: Present,
        place: Place,
        send: Send,
    ) -> None:
        assert request.route is not None
        self._forwarder, self._request, self._send = forwarder, request, send
        self._route = request.route
        self.present, self._place, self._engine = present, place, place.engine
        self._task = asyncio.current_task()
        #: The request's name at the engine, which tells the first token by this name.
        self._name = forwarder.first_tokens.expect(request.prepared.cost.copies, self._begin)
        #: Whether the engine answered with a failure of its own.
        self._failed = False
        #: Why the gateway ended the request, if it did.
        self._refusal: Refusal | None = None
        request.broken = False  # perhaps an engine that was not reached was given up

    async def run(self) -> None:
        """Send the request and pass the answer on.

        Raises:
            Unreachable: the engine did not receive the request.
            Refusal: the engine died before the answer began.
        """
        engine, left = self._engine, False
        engine.in_flight[self.present] = self.stop
        self.present.sent_at, self.present.begun = time.monotonic(), False
        if self.present.grammar is not None:
            engine.got_grammar.set()
        if not engine.owes:
            engine.asked_at = self.present.sent_at
        engine.outstanding += 1
        try:
            await self._ask()
            if not self._failed:
                self._forwarder.deny_list.answered(self.present)
        except (Died, aiohttp.ClientError, OSError):
            self._note_break()
            await self._end_broken()
        except asyncio.CancelledError:
            left = not self._request.broken  # not cancelled by `stop`
            if left and self._refusal is None:
                # If the engine has died since, its death was noted with this request already.
                if not engine.dead_since(self.present.sent_at):
                    self.present.left_at = time.monotonic()
                    engine.left.append(self.present)
                raise
            uncancel(self._task)
            await self._end_broken()
        finally:
            self._forwarder.first_tokens.forget(self._name)
            engine.outstanding -= 1
            engine.in_flight.pop(self.present, None)
            self._leave(left)

    def _leave(self, left: bool) -> None:
        """Free the request's place at the engine, and tell the monitor if the engine failed.

        ``left``: the client has left.
        """
        engine, forwarder = self._engine, self._forwarder
        # A connection may break while the engine lives and continues with the request. An engine
        # notices soon only that the reader of a stream has left.
        may_go_on = not self._request.started and (left or self._request.broken)
        self._place.leave(LEFT_SECONDS if may_go_on else 0.0, left=left)
        if self._request.broken or self._failed:
            forwarder.suspect(engine)
            # An engine that broke off before the first byte has probably died. It has no other
            # requests then, so it would be chosen first, and would break off every new request.
            others_open = forwarder.fleet.open - engine.up
            if self._request.broken and not self._request.started and others_open:
                forwarder.doubt(engine)
            forwarder.metrics.count("engine_failures_total", f"engine={engine.index}")

    def stop(self, refusal: Refusal | None) -> None:
        """End the request, because the gateway refuses it from now on.

        Without a refusal, the monitor gave up the engine.
        """
        if (
            self._task is None
            or self._request.broken
            or (refusal is not None and self._refusal is not None)
        ):
            return
        if refusal is None:
            self._note_break()
        self._refusal = self._refusal or refusal
        self._task.cancel()

    def _note_break(self) -> None:
        """Note that the exchange broke off, and suspect the requests at the engine."""
        if self._request.broken:
            return
        self._request.broken = True
        if not self._forwarder.before_nodes:  # no request ends a node, only its engines
            self._forwarder.deny_list.engine_died(self._engine, self.present.sent_at)
        self._engine.in_flight.pop(self.present, None)

    def _succeeded(self) -> None:
        """Note that the engine works, unless it has died since the request was sent."""
        if not self._engine.dead_since(self.present.sent_at):
            self._engine.succeeded()

    async def _ask(self) -> None:
        """Send the request, and pass the engine's answer on as a stream or in one piece."""
        request, route, forwarder = self._request, self._route, self._forwarder
        headers = sent_headers(request, to_node=forwarder.before_nodes)
        headers[EXCHANGE] = self._name
        response = await forwarder.upstream.open(
            self._engine, route.method, route.path, request.body or None, headers
        )
        forwarder.bodies.forget(request)  # no other engine is asked from now on
        for name in OF_NODES if forwarder.before_nodes else ():
            if name in response.headers:
                request.answer_headers.append(
                    (name.encode(), response.headers[name].encode("latin-1"))
                )
        try:
            self._failed = response.status >= 500
            kind = response.headers.get("Content-Type", "application/json")
            if response.status == 200 and kind.startswith("text/event-stream"):
                await self._stream(response, kind)
            else:
                await self._whole(response, kind)
        finally:
            if response.content.at_eof():
                response.release()
            else:  # the engine stops when the connection closes
                response.close()

    async def _stream(self, response: aiohttp.ClientResponse, kind: str) -> None:
        """Pass the events of a stream on as they come, but only complete events.

        So a stream that breaks off can still end with an error event.
        """
        content, rest = response.content, b""
        while data := await content.readany():
            if rest or not data.endswith(b"\n\n"):
                data, rest = _events(rest + data)
            await self._pass_on(data, kind)
        if rest:
            await self._pass_on(rest, kind)
        if not self._request.started:
            raise Died("an empty stream")
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pass_on(self, events: bytes, kind: str) -> None:
        """Pass complete events on to the client; ``events`` is empty if only a part of one came.

        LMDeploy's event about the end of its loop is left out, since turbofit ends the stream with
        an error event of its own.
        """
        end = _UNAVAILABLE_EVENT.search(events) if _UNAVAILABLE in events else None
        if end is not None:
            events = events[: end.start()]
        if not events:
            self._engine.note_byte()
        else:
            note_said(self.present, events)
            self._note_events(events)
            if not self._request.started:
                no_buffer = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
                await self._start(200, kind, no_buffer)
            self._request.bytes_out += len(events)
            await self._send({"type": "http.response.body", "body": events, "more_body": True})
        if end is not None:
            raise self._loop_ended()

    def _loop_ended(self) -> Died:
        """Return the error for an engine whose loop has ended while its server lives."""
        self._forwarder.doubt(self._engine)
        return Died("the engine's loop has ended")

    def _note_events(self, events: bytes) -> None:
        """Note that events came; at the first output, note that the answer begins."""
        if self._request.first_byte is not None:
            self._engine.note_byte()
            return
        if self._route.api == "responses" and not _GENERATED.search(events):
            self._failed |= _FAILED.search(events) is not None
            return
        self._request.first_byte = time.perf_counter()
        self.present.begun = True
        if events.startswith(_ERROR_EVENTS):
            self._failed = True
            return
        self._succeeded()
        # The engine has encoded the images of the copy that answers, but maybe of no other copy.
        if self._request.prepared.cost.copies == 1:
            self._begin()

    def _begin(self, prompt: int = 0) -> None:
        """Note that the first token of every copy came, so that all images are encoded.

        ``prompt`` are the tokens before the answer of a copy, 0 if unknown.
        """
        self.present.begun = True
        self._succeeded()
        self._forwarder.deny_list.answered(self.present)
        images = self._request.prepared.tokens
        self._place.begin(prompt if prompt > images else 0)  # a prompt without them is no bound

    async def _whole(self, response: aiohttp.ClientResponse, kind: str) -> None:
        """Read an answer until it is complete, then pass it on in one piece."""
        data = bytearray()
        while chunk := await response.content.readany():
            data += chunk
            self.present.begun = True
            self._engine.note_byte()
            if len(data) > _LARGEST_ANSWER:
                # 422, since clients would try again after a 5xx.
                raise Refusal("answer_too_large", most=_LARGEST_ANSWER)
        if response.status == 503 and _UNAVAILABLE in data:
            self.present.begun = False  # this request may have ended the loop
            raise self._loop_ended()
        status, body = response.status, bytes(data)
        if status >= 400:
            status, body = self._in_form(status, body)
            kind = "application/json"
        self._request.first_byte = time.perf_counter()
        if response.status == 200:
            if self._route.kind not in ("count_tokens", "models"):
                self._succeeded()
            if self._route.kind == "count_tokens":  # LMDeploy got the request without its images
                with suppress(msgspec.MsgspecError, LookupError, TypeError):
                    document = msgspec.json.decode(body)
                    document["input_tokens"] += self._request.prepared.tokens
                    body = msgspec.json.encode(document)
        headers = [(b"content-length", str(len(body)).encode())]
        retry = response.headers.get("Retry-After")
        if retry is not None and retry.isdigit():
            headers.append((b"retry-after", retry.encode()))
        await self._start(status, kind, headers)
        self._request.bytes_out += len(body)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    def _in_form(self, status: int, body: bytes) -> tuple[int, bytes]:
        """Return the status and body of an engine's error in the form of the client's API.

        The reason of the error is noted for the record.
        """
        request, api = self._request, self._route.api
        if self._forwarder.before_nodes:
            return status, body  # the node has given the error this form
        refusal = refusal_of_engine(api, status, body)
        if refusal is None:
            return status, body
        request.reason, self._failed = refusal.reason, refusal.status >= 500
        return refusal.status, refusal_body(api, refusal, request.id)

    async def _start(self, status: int, kind: str, headers: HeaderList) -> None:
        """Send the headers of the answer to the client; ``kind`` is the content type."""
        self._request.started, self._request.status = True, status
        head = [
            (b"content-type", kind.encode("latin-1", "replace")),
            *headers,
            *self._request.answer_headers,
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": head})

    async def _end_broken(self) -> None:
        """End a stream with an error event; raise a refusal if the stream has not begun."""
        fleet = self._forwarder.fleet
        again = _RETRY_DIED if fleet.open else fleet.retry_seconds
        refusal = self._refusal or Refusal("engine_died", retry_after=again)
        if not self._request.started:
            raise refusal
        event = refusal_event(self._route.api, refusal)
        self._request.bytes_out += len(event)
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


def _events(data: bytes) -> tuple[bytes, bytes]:
    """Split a stream's data into its complete events and the rest.

    A very long rest counts as a complete event.
    """
    events, end, rest = data.rpartition(b"\n\n")
    return (data, b"") if len(rest) > _LONGEST_EVENT else (events + end, rest)


@dataclass
class RequestForwarder:
    """Forwards requests to engines.

    If an engine cannot be reached, its request goes to another engine, and the engine gets no new
    requests. A request whose engine dies is answered with 503, and the client may send it again. An
    engine's error counts as an answer, except LMDeploy's 503 after its loop has ended.

    ``before_nodes``: each engine is a node of a cluster, with a gateway of its own.
    """

    fleet: Fleet
    admission: Admission
    upstream: Upstream
    #: Sends an engine no new requests until it answers.
    doubt: Callable[[RoutedEngine], None]
    #: Notes that a request failed at an engine.
    suspect: Callable[[RoutedEngine], None]
    deny_list: DenyList
    first_tokens: FirstTokens
    bodies: Bodies
    metrics: Metrics
    before_nodes: bool = False

    async def forward(self, request: RequestContext, send: Send) -> None:
        """Wait for room, send the request to an engine, and pass the answer on.

        Raises:
            Refusal: no engine has room in time, no engine is reached, or the request's engine died.
        """
        assert request.route is not None
        present = Present(grammar=request.grammar)
        if request.body and not self.before_nodes:  # nodes have deny lists of their own
            path = request.route.path
            present.fingerprint = await self.deny_list.fingerprint(path, request.body)
        conversation = None
        if request.body and self.fleet.keeps_conversations:
            kind = request.route.kind
            conversation = await conversation_of(kind, request.body, request.key)
        for _ in range(_MOST_ENGINES):
            place = await self._take(request, present, conversation)
            engine = request.engine = place.engine
            exchange = Exchange(self, request, present, place, send)
            try:
                return await exchange.run()
            except Unreachable as exc:
                # This request is sent to another engine, and so are new requests.
                self.doubt(engine)
                self.metrics.count("engine_failures_total", f"engine={engine.index}")
                if exc.ended:  # perhaps because of a request whose client has left
                    self.deny_list.nothing_listens(engine)
        raise self.fleet.dead()

    async def _take(
        self, request: RequestContext, present: Present, conversation: Conversation | None
    ) -> Place:
        """Wait for a place at an engine; a suspect also waits for its turn there.

        A suspect that must be alone waits until the answers of the other requests have begun.
        """
        while True:
            turn = self.deny_list.turn(present)
            cost = request.prepared.cost
            place = await self.admission.admit(request.who, cost, turn, conversation)
            same = False
            try:
                if turn is not None and turn.alone:
                    until = time.monotonic() + _LONGEST_WAIT
                    others = place.engine.in_flight
                    while time.monotonic() < until and not all(request.begun for request in others):
                        await asyncio.sleep(0.02)
                # During the wait, the deny list may have changed.
                same = self.deny_list.turn(present) == turn
            finally:
                if not same:
                    place.leave()
            if same:
                if conversation is not None and conversation.goes_on:
                    labels = (f"engine={place.engine.index}", f"kept={str(place.kept).lower()}")
                    self.metrics.count("follow_ups_total", *labels)
                return place
