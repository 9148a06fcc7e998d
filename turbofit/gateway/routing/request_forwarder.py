"""From a prepared request to its answer: a place at an engine, another one where that is gone."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import aiohttp
import msgspec

from turbofit.gateway.http.refusals import Refusal, of_engine, refusal_body, refusal_event
from turbofit.gateway.http.request_context import ForwardOutcome, sent_headers, uncancel
from turbofit.gateway.routing.deny_file import fingerprint
from turbofit.gateway.routing.engines import LEFT_SECONDS, Present
from turbofit.gateway.upstream import Died, Unreachable

if TYPE_CHECKING:
    from turbofit.gateway.http.body import Bodies
    from turbofit.gateway.http.metrics import Metrics
    from turbofit.gateway.http.request_context import RequestContext, Send
    from turbofit.gateway.routing.admission import Admission, Place
    from turbofit.gateway.routing.deny_list import DenyList
    from turbofit.gateway.routing.engines import EngineDeath, Fleet, RoutedEngine
    from turbofit.gateway.routing.health import Monitor
    from turbofit.gateway.upstream import Upstream

    HeaderList = list[tuple[bytes, bytes]]

#: Engines that may not be reached, one after the other: with the gateway's own network gone each
#: would cost its client a timeout.
_MOST_ENGINES: Final = 16
#: Seconds that a turn alone waits for what the engine has to begin its answer, and between looks.
_LONGEST_WAIT, _LOOK = 30.0, 0.02
_LARGEST_ANSWER: Final = 64 << 20
#: An event longer than this is passed on in pieces.
_LONGEST_EVENT: Final = 1 << 20
_RETRY_DIED: Final = 5
#: Seconds that a turn lasts on after the answer began, where that is not enough to clear it.
_LONGER: Final = 10.0
#: An event of a stream, and how many bytes at the end of an answer may hold its usage.
_DATA: Final = b"data: {"
_TAIL: Final = 4096
#: How a stream begins whose engine is out of order.
_ERROR_EVENTS: Final = (b'data: {"error"', b"event: error")
#: What LMDeploy's server answers, with 503 or in an event, once its engine's loop has ended: the
#: server lives on. Over: LMDeploy says so of a session or a queue that is gone, too; an engine that
#: lives is back once it answers a probe. lmdeploy core/exceptions.py::ERROR_MESSAGES #3b7494
_UNAVAILABLE: Final = b"The inference engine is unavailable."
#: An event whose error has this message and no more. Quotes that a model or a client wrote are
#: escaped there.
_UNAVAILABLE_EVENT: Final = re.compile(
    rb'(?:\A|(?<=\n\n))(?:event: [\w.]+\n)?data: \{[^\n]*?"error": ?\{[^{}\n]*"message": ?"'
    + re.escape(_UNAVAILABLE)
    + b'"'
)
#: Events of the Responses API that the engine's output makes; LMDeploy's server sends the others
#: without it. And those that tell of an error.
_GENERATED: Final = re.compile(
    rb"(?:\A|\n\n)event: response\.[\w.]*(?:delta|completed|incomplete)\n"
)
_FAILED: Final = re.compile(rb"(?:\A|\n\n)event: (?:error|response\.failed)\n")


class Exchange(ForwardOutcome):
    """One request sent to one engine, and its answer passed on; an `engines.InFlight`."""

    def __init__(
        self,
        forwarder: RequestForwarder,
        request: RequestContext,
        present: Present,
        place: Place,
        send: Send,
    ) -> None:
        super().__init__()
        assert request.route is not None
        self._by, self._request, self._route, self._send = forwarder, request, request.route, send
        self.present, self._place, self._engine = present, place, place.engine
        self._task = asyncio.current_task()
        self.heard_at = time.monotonic()
        self._death: EngineDeath | None = None
        #: The engine lives, and sent nothing of this answer; it answered that it cannot serve.
        self._stuck = self._failed = False

    async def run(self) -> None:
        """Send the request and pass the answer on; `Unreachable` where it was never sent."""
        engine, left = self._engine, False
        engine.in_flight[self] = None
        self.present.sent_at, self.present.begun = self.heard_at, False
        engine.outstanding += 1
        if engine.outstanding == 1:
            engine.heard()  # its silence counts from now
        try:
            await self._ask()
            if not self._failed:
                self._by.deny_list.answered(self.present)
        except (Died, aiohttp.ClientError, OSError):
            self._note_break()
            await self._end_broken()
        except asyncio.CancelledError:
            if not self.broken:  # by `abort`
                left = True
                if not engine.dead_since(self.present.sent_at):
                    self.present.left_at = time.monotonic()
                    engine.left.append(self.present)
                raise
            uncancel(self._task)
            await self._end_broken()
        finally:
            engine.outstanding -= 1
            engine.in_flight.pop(self, None)
            self._leave(left)

    def _leave(self, left: bool) -> None:
        """Give the place back, and tell the monitor what was seen of the engine."""
        engine, by = self._engine, self._by
        # A connection may break while the engine lives, and goes on with the request.
        goes_on = self._stuck or (not self.present.begun and (left or self.broken))
        self._place.leave(LEFT_SECONDS if goes_on else 0.0, left=left)
        if self.broken or self._failed:
            by.monitor.suspect(engine)
            # One that broke off before a byte came is starting again, or about to: where others
            # are up, it would be asked first, having nothing, and break off every request.
            unbegun = self.broken and not self.started and not self._stuck
            if unbegun and by.fleet.open > engine.up:
                by.monitor.doubt(engine)
            by.metrics.count("engine_failures_total", f"engine={engine.index}")

    def abort(self, *, stuck: bool = False) -> None:
        """The engine was given up, or is stuck in this request: stop waiting for it."""
        if self._task is not None and not self.broken:
            self._stuck = stuck
            self._note_break()
            self._task.cancel()

    def _note_break(self) -> None:
        if self.broken:
            return
        self.broken = True
        if self._stuck:
            self._death = self._by.deny_list.stuck(self._engine, self.present)
        else:
            self._death = self._by.deny_list.engine_died(self._engine, self.present.sent_at)
        self._engine.in_flight.pop(self, None)

    def _hear(self) -> None:
        self._engine.heard()
        self.heard_at = self._engine.heard_at

    def _succeeded(self) -> None:
        """The engine answered; what lay in a socket when it died tells of no other process."""
        if not self._engine.dead_since(self.present.sent_at):
            self._engine.succeeded()

    async def _ask(self) -> None:
        request, route, by = self._request, self._route, self._by
        response = await by.upstream.open(
            self._engine, route.method, route.path, request.body or None, sent_headers(request)
        )
        by.bodies.forget(request)  # nobody else is asked from now on
        try:
            self.status = response.status
            self._failed = response.status >= 500
            kind = response.headers.get("Content-Type", "application/json")
            if response.status == 200 and kind.startswith("text/event-stream"):
                await self._stream(response, kind)
            else:
                await self._whole(response, kind)
        finally:
            # Unread answers close the connection, which is how the engine learns to stop.
            response.close() if not response.content.at_eof() else response.release()

    async def _stream(self, response: aiohttp.ClientResponse, kind: str) -> None:
        """Whole events as they come, so that a broken stream can still end with one."""
        content, rest = response.content, b""
        while data := await content.readany():
            if rest or not data.endswith(b"\n\n"):
                data, rest = _events(rest + data)
            await self._take(data, kind)
        if rest:
            await self._take(rest, kind)
        if not self.started:
            raise Died("an empty stream")
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _take(self, events: bytes, kind: str) -> None:
        """Pass whole events on; none where only a part of one came."""
        end = _UNAVAILABLE_EVENT.search(events) if _UNAVAILABLE in events else None
        if end is not None:
            events = events[: end.start()]
        if not events:
            self._hear()
        else:
            self._note_events(events)
            if not self.started:
                no_buffer = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
                await self._start(200, kind, no_buffer)
            self.bytes_out += len(events)
            self.events += events.count(_DATA)
            if b'"usage"' in events:
                self.tail = events[-_TAIL:]
            await self._send({"type": "http.response.body", "body": events, "more_body": True})
        if end is not None:
            raise self._loop_ended()

    def _loop_ended(self) -> Died:
        self._by.monitor.doubt(self._engine)
        return Died("the engine's loop has ended")

    def _note_events(self, events: bytes) -> None:
        if self.first_byte is not None:
            self._hear()
            return
        if self._route.api == "responses" and not _GENERATED.search(events):
            self._failed |= _FAILED.search(events) is not None
            return
        self.first_byte = time.perf_counter()
        self.present.begun = True
        self.heard_at = time.monotonic()
        if events.startswith(_ERROR_EVENTS):
            self._failed = True
            return
        self._succeeded()
        # All images are behind it; of several copies the first byte tells only about one.
        if self._request.prepared.cost.copies == 1:
            self._place.begin()
            if self._place.turn is not None and self._place.turn.longer:
                asyncio.get_running_loop().call_later(_LONGER, self._end_turn_well)
            else:
                self._end_turn_well()

    def _end_turn_well(self) -> None:
        turn = self._place.turn
        if turn is not None and self._engine.turn_of is turn:
            self._by.deny_list.answered(self.present)
            self._place.end_turn()

    async def _whole(self, response: aiohttp.ClientResponse, kind: str) -> None:
        """An answer in one piece, kept back until it is whole."""
        data = bytearray()
        while chunk := await response.content.readany():
            data += chunk
            self.present.begun = True
            self._hear()
            if len(data) > _LARGEST_ANSWER:
                # 422: clients would try again after a 5xx.
                raise Refusal("answer_too_large", most=_LARGEST_ANSWER)
        if response.status == 503 and _UNAVAILABLE in data:
            self.present.begun = False
            raise self._loop_ended()
        body = bytes(data)
        if response.status >= 400:
            body, kind = self._in_form(body), "application/json"
        self.first_byte = time.perf_counter()
        if response.status == 200:
            if self._route.kind not in ("count_tokens", "models"):
                self._succeeded()
            if self._route.kind == "count_tokens":
                body = _with_image_tokens(body, self._request.prepared.tokens)
        self.tail = body[-_TAIL:]
        headers = [(b"content-length", str(len(body)).encode())]
        retry = response.headers.get("Retry-After")
        if retry is not None and retry.isdigit():
            headers.append((b"retry-after", retry.encode()))
        await self._start(self.status, kind, headers)
        self.bytes_out += len(body)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    def _in_form(self, body: bytes) -> bytes:
        """An engine's error as its client's API has errors, and in turbofit's words."""
        request, api = self._request, self._route.api
        lacks_grammar = request.prepared.lacks_grammar
        refusal = of_engine(api, self.status, body, lacks_grammar=lacks_grammar)
        if refusal is None:
            return body
        request.reason, self.status = refusal.reason, refusal.status
        self._failed = self.status >= 500
        return refusal_body(api, refusal, request.id)

    async def _start(self, status: int, kind: str, headers: HeaderList) -> None:
        self.started = True
        head = [(b"content-type", kind.encode("latin-1", "replace")), *headers, *self._request.out]
        await self._send({"type": "http.response.start", "status": status, "headers": head})

    async def _end_broken(self) -> None:
        """An error event where the stream had begun, else a refusal once all are suspected."""
        fleet, key = self._by.fleet, "engine_died:stuck" if self._stuck else "engine_died"
        refusal = Refusal(key, retry_after=_RETRY_DIED if fleet.open else fleet.retry_seconds)
        if not self.started:
            await _concluded(self._death)
            raise refusal
        event = refusal_event(self._route.api, refusal)
        self.bytes_out += len(event)
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


def _events(data: bytes) -> tuple[bytes, bytes]:
    """What ends in whole events, and the rest."""
    at = data.rfind(b"\n\n")
    if at < 0:
        return (data, b"") if len(data) > _LONGEST_EVENT else (b"", data)
    return data[: at + 2], data[at + 2 :]


def _with_image_tokens(body: bytes, tokens: int) -> bytes:
    """A count of the text's tokens with those of the images."""
    try:
        document = msgspec.json.decode(body)
        document["input_tokens"] += tokens
    except (msgspec.MsgspecError, LookupError, TypeError):
        return body
    return msgspec.json.encode(document)


@dataclass
class RequestForwarder:
    """Forwards requests to engines.

    A request goes to another engine where its own could not be reached: that one never had it, and
    gets nothing new. Who was at a death gets 503 and may ask again. An engine that answers, with an
    error too, has answered, but for LMDeploy's 503 of an engine whose loop has ended.
    """

    fleet: Fleet
    admission: Admission
    upstream: Upstream
    monitor: Monitor
    deny_list: DenyList
    bodies: Bodies
    metrics: Metrics

    async def forward(self, request: RequestContext, send: Send) -> None:
        """Wait for room, send the request to an engine, and pass the answer on; or a `Refusal`."""
        assert request.route is not None
        present = Present(request.who)
        if request.body:
            key = self.deny_list.file.key
            present.fingerprint = fingerprint(key, request.route.path, request.body)
        for _ in range(_MOST_ENGINES):
            place = await self._take(request, present)
            engine = request.engine = place.engine
            request.outcome = exchange = Exchange(self, request, present, place, send)
            try:
                return await exchange.run()
            except Unreachable as exc:
                # Nobody was asked: whoever comes next gets another engine.
                self.monitor.doubt(engine)
                self.metrics.count("engine_failures_total", f"engine={engine.index}")
                # An equal request may be what it died of.
                await _concluded(self.deny_list.nothing_listens(engine) if exc.ended else None)
        raise self.fleet.dead()

    async def _take(self, request: RequestContext, present: Present) -> Place:
        """A place at an engine, beside others, or in a suspect's turn."""
        cost, prefixes = request.prepared.cost, request.prefixes
        while True:
            turn = await self.deny_list.turn(present)
            place = await self.admission.admit(request.who, cost, turn, prefixes)
            try:
                # Much may have become known while it waited.
                now = await self.deny_list.turn(present)
                same = (now and now.name) == (turn and turn.name)
                if same and turn is not None and now is not None:
                    turn.alone |= now.alone
                    turn.longer |= now.longer
                    if turn.alone:
                        await _until_others_have_begun(place.engine)
            except BaseException:
                place.leave()
                raise
            if same:
                present.turn = turn
                return place
            place.leave()


async def _concluded(death: EngineDeath | None) -> None:
    if death is not None and death.concluding is not None:
        await death.concluding


async def _until_others_have_begun(engine: RoutedEngine) -> None:
    until = time.monotonic() + _LONGEST_WAIT
    while time.monotonic() < until and any(
        not exchange.present.begun for exchange in engine.in_flight
    ):
        await asyncio.sleep(_LOOK)
