"""One request at one engine: sent, its answer passed on as it comes, and never left hanging."""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import msgspec

from turbofit.gateway.http.refusals import Refusal, of_engine, refusal_event
from turbofit.gateway.http.sockets import vanished
from turbofit.gateway.routing.suspects import ForwardOutcome
from turbofit.gateway.routing.upstream import Died
from turbofit.gateway.tasks import uncancel

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.gateway.http.asgi import Send
    from turbofit.gateway.routing.deny_list import DenyList
    from turbofit.gateway.routing.engines import RoutedEngine
    from turbofit.gateway.routing.request_context import RequestContext
    from turbofit.gateway.routing.upstream import Upstream

    HeaderList = list[tuple[bytes, bytes]]

__all__ = ["EngineDied", "Exchange"]

_LARGEST_ANSWER: Final = 64 << 20
#: An event longer than this is passed on in pieces.
_LONGEST_EVENT: Final = 1 << 20
_RETRY_DIED: Final = 5
#: An event of a stream, and how many bytes at the end of an answer may hold its usage.
_DATA: Final = b"data: {"
_TAIL: Final = 4096
#: How a stream begins whose engine is out of order.
_ERROR_EVENTS: Final = (b'data: {"error"', b"event: error")
#: What LMDeploy's server answers, with 503 or in an event, once its engine's loop has ended: the
#: server lives on. Over: LMDeploy says so of a session or a queue that is gone, too; an engine that
#: lives is back once it answers a probe. Source: LMDeploy 0.18 serve/core/exceptions.py.
_UNAVAILABLE: Final = b"The inference engine is unavailable."
#: An event whose error has this message and no more. Quotes that a model or a client wrote are
#: escaped there.
_UNAVAILABLE_EVENT: Final = re.compile(
    rb'(?:\A|(?<=\n\n))(?:event: [\w.]+\n)?data: \{[^\n]*?"error": ?\{[^{}\n]*"message": ?"'
    + re.escape(_UNAVAILABLE)
    + b'"'
)
_LOOP_ENDED: Final = "the engine's loop has ended"
#: Events of the Responses API that the engine's output makes; LMDeploy's server sends the others
#: without it. And those that tell of an error.
_GENERATED: Final = re.compile(
    rb"(?:\A|\n\n)event: response\.[\w.]*(?:delta|completed|incomplete)\n"
)
_FAILED: Final = re.compile(rb"(?:\A|\n\n)event: (?:error|response\.failed)\n")


class EngineDied(Refusal):
    """The engine broke off before anything was passed on: another one may be asked."""

    def __init__(self, key: str = "engine_died") -> None:
        super().__init__(key, retry_after=_RETRY_DIED)


class Exchange:
    """One request sent to one engine, and its answer passed on.

    Args:
        upstream: the connection.
        engine: where it goes.
        request: what is asked there, by whom.
        send: the client, as ASGI has it.
        sent: called once the engine has the request.
        begins: called before anything is passed to the client; nobody else is asked from then on.
        first: called at the answer's first byte, where the engine has all images behind it.
        loop_ended: called where the engine's loop has ended, before the client is told.
        deny_list: told of the engine's death.
    """

    def __init__(  # noqa: PLR0913 - a constructor
        self,
        upstream: Upstream,
        engine: RoutedEngine,
        request: RequestContext,
        send: Send,
        sent: Callable[[], None],
        begins: Callable[[], None],
        first: Callable[[], None],
        loop_ended: Callable[[], None],
        deny_list: DenyList,
    ) -> None:
        assert request.route is not None
        self._upstream, self._engine, self._route = upstream, engine, request.route
        self._request, self._send = request, send
        self._sent, self._begins, self._first = sent, begins, first
        self._loop_ended, self._deny_list = loop_ended, deny_list
        self._task: asyncio.Task[Any] | None = None
        self._aborted = False
        self.heard_at = self._sent_at = 0.0
        self.present = request.present
        self.outcome = ForwardOutcome()

    async def run(self, body: bytes, sent_headers: dict[str, str]) -> None:
        """Send the request and pass the answer on.

        Args:
            body: of the request.
            sent_headers: for the engine.

        Raises:
            EngineDied: it broke off, or was taken out, before anything was passed on.
            Unreachable: the request was never sent.
            Refusal: its answer in one piece is larger than the gateway holds.
        """
        engine, self._task = self._engine, asyncio.current_task()
        engine.in_flight[self] = None
        self.heard_at = self._sent_at = time.monotonic()
        if self.present is not None:
            self.present.sent_at, self.present.begun = self._sent_at, False
        engine.outstanding += 1
        if engine.outstanding == 1:
            engine.heard()  # its silence counts from now
        try:
            response = await self._open(body, sent_headers)
            del body
            await self._answer(response)
        except (Died, aiohttp.ClientError, OSError) as exc:
            self.outcome.vanished = vanished(exc)
            self._note_break(died=not self.outcome.vanished)
            await self._end_broken()
        except asyncio.CancelledError:
            if not self._aborted:
                if self.present is not None and not engine.dead_since(self._sent_at):
                    self.present.left_at = time.monotonic()
                    engine.left.append(self.present)
                raise
            uncancel(self._task)
            await self._end_broken()
        finally:
            engine.outstanding -= 1
            engine.in_flight.pop(self, None)

    @property
    def begun(self) -> bool:
        """Whether a byte of the answer came."""
        return self.outcome.answered

    def _begins_to_answer(self, begins: bool = True) -> None:
        """A byte of the answer came, or what came was none."""
        self.outcome.answered = begins
        if self.present is not None:
            self.present.begun = begins

    def abort(self, *, died: bool, stuck: bool = False) -> None:
        """The engine was given up, or is stuck in this request: stop waiting for it.

        Where it broke off, the client is being told so already.
        """
        if self._task is not None and not self.outcome.broken:
            self._aborted = True
            self.outcome.stuck = stuck
            self._note_break(died=died)
            self._task.cancel()

    def _note_break(self, *, died: bool) -> None:
        """The engine broke off, and whether it died."""
        engine, outcome = self._engine, self.outcome
        if outcome.broken:
            return
        outcome.broken = True
        if died:
            if outcome.stuck:
                outcome.death = self._deny_list.stuck(engine, self.present)
            else:
                outcome.death = self._deny_list.engine_died(engine, self._sent_at)
        engine.in_flight.pop(self, None)

    def _hear(self) -> None:
        """A byte came."""
        self._engine.heard()
        self.heard_at = self._engine.last_byte

    def _succeeded(self) -> None:
        """The engine answered; what lay in a socket when it died tells of no other process."""
        if not self._engine.dead_since(self._sent_at):
            self._engine.succeeded()

    async def _open(self, body: bytes, headers: dict[str, str]) -> aiohttp.ClientResponse:
        route = self._route
        response = await self._upstream.open(
            self._engine, route.method, route.path, body or None, headers
        )
        self._sent()
        return response

    async def _answer(self, response: aiohttp.ClientResponse) -> None:
        try:
            self.outcome.status = response.status
            self.outcome.failed = response.status >= 500
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
        if not self.outcome.started:
            raise Died("an empty stream")
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _take(self, events: bytes, kind: str) -> None:
        """Pass whole events on; none where only a part of one came.

        Raises:
            Died: the engine's server says that the engine's loop has ended.
        """
        end = _UNAVAILABLE_EVENT.search(events) if _UNAVAILABLE in events else None
        if end is not None:
            events = events[: end.start()]
        if events:
            self._note_events(events)
            await self._pass(events, kind)
        else:
            self._hear()
        if end is not None:
            self._loop_ended()
            raise Died(_LOOP_ENDED)

    def _note_events(self, events: bytes) -> None:
        """Note what events say of the engine: when it was heard, whether it answers or failed."""
        if self.outcome.first_byte is not None:
            self._hear()
            return
        if self._route.api == "responses" and not _GENERATED.search(events):
            self.outcome.failed |= _FAILED.search(events) is not None
            return
        self.outcome.first_byte = time.perf_counter()
        self._begins_to_answer()
        self.heard_at = time.monotonic()
        if events.startswith(_ERROR_EVENTS):
            self.outcome.failed = True
        else:
            self._succeeded()
            self._first()

    async def _whole(self, response: aiohttp.ClientResponse, kind: str) -> None:
        """An answer in one piece, kept back until it is whole.

        Raises:
            Refusal: 422 where it is too large; clients would try again after a 5xx. 400 where the
                engine lacks an option.
        """
        data = bytearray()
        while chunk := await response.content.readany():
            data += chunk
            self._begins_to_answer()
            self._hear()
            if len(data) > _LARGEST_ANSWER:
                raise Refusal("answer_too_large", most=_LARGEST_ANSWER)
        if response.status == 503 and _UNAVAILABLE in data:
            self._begins_to_answer(False)
            self._loop_ended()
            raise Died(_LOOP_ENDED)
        refusal = of_engine(bytes(data)) if response.status == 400 else None
        if refusal is not None:
            raise refusal
        self.outcome.first_byte = time.perf_counter()
        if response.status == 200 and self._route.kind not in ("count_tokens", "encode", "models"):
            self._succeeded()
        body = self._counted(bytes(data)) if response.status == 200 else bytes(data)
        self.outcome.tail = body[-_TAIL:]
        headers = [(b"content-length", str(len(body)).encode())]
        retry = response.headers.get("Retry-After")
        if retry is not None and retry.isdigit():
            headers.append((b"retry-after", retry.encode()))
        await self._start(response.status, kind, headers)
        self.outcome.bytes_out += len(body)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    def _counted(self, body: bytes) -> bytes:
        """Image tokens added to a count of the text."""
        if self._route.kind != "count_tokens" or not self._request.prepared.tokens:
            return body
        try:
            document = msgspec.json.decode(body)
            document["input_tokens"] += self._request.prepared.tokens
        except (msgspec.MsgspecError, LookupError, TypeError):
            return body
        return msgspec.json.encode(document)

    async def _pass(self, data: bytes, kind: str) -> None:
        if not self.outcome.started:
            no_buffer = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
            await self._start(200, kind, no_buffer)
        self.outcome.bytes_out += len(data)
        self.outcome.events += data.count(_DATA)
        if b'"usage"' in data:
            self.outcome.tail = data[-_TAIL:]
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def _start(self, status: int, kind: str, headers: HeaderList) -> None:
        self.outcome.started = True
        self._begins()
        head = [(b"content-type", kind.encode("latin-1", "replace")), *headers, *self._request.out]
        await self._send({"type": "http.response.start", "status": status, "headers": head})

    async def _end_broken(self) -> None:
        """An error event where the stream had begun, else `EngineDied`."""
        refusal = EngineDied("engine_died:stuck") if self.outcome.stuck else EngineDied()
        if not self.outcome.started:
            raise refusal
        event = refusal_event(self._route.api, refusal)
        self.outcome.bytes_out += len(event)
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


def _events(data: bytes) -> tuple[bytes, bytes]:
    """What ends in whole events, and the rest."""
    at = data.rfind(b"\n\n")
    if at < 0:
        return (data, b"") if len(data) > _LONGEST_EVENT else (b"", data)
    return data[: at + 2], data[at + 2 :]
