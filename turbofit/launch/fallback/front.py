"""The ASGI application before ``transformers serve``'s own: key, routes, one request at a time.

It changes what that server does unlike the OpenAI API: unknown keys are ignored, failures have the
API's form, streams end in ``[DONE]``, the list of models names the one that is served, and a client
that goes away stops the work.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from turbofit.launch.fallback.errors import RequestRefused, error_body, of_client, refused_by
from turbofit.launch.fallback.inner_body import CHAT, COMPLETIONS, inner_body

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.core.json_types import JsonObject
    from turbofit.gateway.http.asgi import Message, Receive, Send
    from turbofit.launch.fallback.work import ServedWork

__all__ = ["FallbackApp"]

_LARGEST: Final = 256 << 20
_PAUSE: Final = 0.02
_RETRY: Final = (b"retry-after", b"5")
_SHOWN: Final = 300


class ClientGone(Exception):  # noqa: N818
    """The client went away."""


class FallbackApp:
    """The application.

    Args:
        inner: Transformers' own.
        work: what is under way there.
        name: the model that is served.
        session_len: tokens of prompt and answer.
        max_images: of one request.
        keys: API keys; none: anybody may ask.
        on_fatal: called with the reason when the process must end, after the answer was sent.
    """

    def __init__(  # noqa: PLR0913 - a constructor
        self,
        inner: Any,
        work: ServedWork,
        *,
        name: str,
        session_len: int,
        max_images: int = 1,
        keys: Sequence[str] = (),
        on_fatal: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._inner, self._work, self._name = inner, work, name
        self._session_len, self._max_images = session_len, max_images
        self._keys = [key.encode() for key in keys]
        self._on_fatal = on_fatal
        self._turn = asyncio.Lock()
        self._created = int(time.time())

    async def __call__(self, scope: JsonObject, receive: Receive, send: Send) -> None:
        """Take one request, or the events of the server's start and end."""
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        try:
            await self._route(scope, receive, send)
        except RequestRefused as refused:
            await _answer(send, refused.status, error_body(refused))
        except ClientGone:
            return
        finally:
            if self._work.fatal:
                self._on_fatal(self._work.fatal)

    async def _route(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if path == "/health":
            health = self._work.health
            status = 200 if health == "ok" else 503
            await _answer(send, status, json.dumps({"status": health}).encode())
            return
        self._check_key(scope)
        if path == "/v1/models" and method == "GET":
            model = {"id": self._name, "object": "model", "owned_by": "turbofit"}
            models = {"object": "list", "data": [{**model, "created": self._created}]}
            await _answer(send, 200, json.dumps(models).encode())
        elif path in (CHAT, COMPLETIONS) and method == "POST":
            body = inner_body(
                path, await _read(receive), self._name, self._session_len, self._max_images
            )
            await self._serve(scope, body, receive, send)
        else:
            raise RequestRefused(
                404, f"{path} is not served by the fallback engine: chat/completions and "
                "completions are", "not_found_error",
            )  # fmt: skip

    def _check_key(self, scope: dict[str, Any]) -> None:
        if not self._keys:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer" or not any(
            hmac.compare_digest(key.strip(), known) for known in self._keys
        ):
            raise RequestRefused(401, "Please request with valid api key!", "authentication_error")

    async def _serve(
        self, scope: dict[str, Any], body: bytes, receive: Receive, send: Send
    ) -> None:
        """Wait for the turn, serve, and end the turn once nothing is generated any more."""
        client = _Client(receive, send)
        try:
            await client.unless_gone(self._turn.acquire())
        except ClientGone:
            if client.acquired:
                self._turn.release()
            raise
        try:
            self._work.take()
            client.on_gone(self._work.cancelled.set)
            try:
                await self._inner_request(scope, body, client)
            except BaseException:
                self._work.cancelled.set()  # the model's thread may go on: nobody reads it
                raise
            finally:
                while not self._work.idle.is_set():
                    await asyncio.sleep(_PAUSE)
        finally:
            client.close()
            self._turn.release()

    async def _inner_request(self, scope: dict[str, Any], body: bytes, client: _Client) -> None:
        headers = [
            (name, value) for name, value in scope["headers"]
            if name not in (b"content-length", b"authorization", b"content-type")
        ]  # fmt: skip
        headers += [
            (b"content-length", str(len(body)).encode()),
            (b"content-type", b"application/json"),
        ]
        answer = _Answer(client.send)
        try:
            await self._inner({**scope, "headers": headers}, client.replay(body), answer.take)
        except Exception as exc:
            if answer.begun:
                raise
            raise self._failed(exc) from exc
        if answer.refused is not None:
            raise answer.refused
        if not answer.begun:
            raise RequestRefused(500, "the engine gave no answer", "server_error")

    def _failed(self, exc: Exception) -> RequestRefused:
        """What to answer to an exception of the inner server."""
        said = " ".join(str(exc).split())[:_SHOWN] or type(exc).__name__
        if self._work.short or type(exc).__name__ == "OutOfMemoryError":
            if not self._work.begun:
                self._work.ran_short(said)
            return RequestRefused(503, said, "server_error")
        if not self._work.begun and of_client(exc):
            return RequestRefused(400, f"the request cannot be read: {said}")
        return RequestRefused(500, f"the engine failed: {said}", "server_error")


class _Client:
    """One side of a connection, watched for its end."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._send = send
        self.acquired = False
        self._gone = asyncio.Event()
        self._then: Callable[[], None] = lambda: None
        self._watch = asyncio.ensure_future(self._watched(receive))

    async def _watched(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone.set()
        self._then()

    def on_gone(self, call: Callable[[], None]) -> None:
        """Have something done when it goes away."""
        self._then = call
        if self._gone.is_set():
            call()

    def close(self) -> None:
        """Watch no more."""
        self._watch.cancel()

    async def unless_gone(self, work: Any) -> None:
        """Await something, or raise `ClientGone` if the client goes first."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if self._gone.is_set():
                self.acquired = task.done()
                task.cancel()
                self.close()
                raise ClientGone
        finally:
            gone.cancel()
        await task

    def replay(self, body: bytes) -> Receive:
        """The request for the inner server: its body at once, then only its end."""
        given = False

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await self._gone.wait()
            return {"type": "http.disconnect"}

        return receive

    async def send(self, message: Message) -> None:
        """Pass a message on, unless the client is gone."""
        if self._gone.is_set():
            return
        with suppress(OSError):
            await self._send(message)


class _Answer:
    """Takes the inner server's answer: holds failures back, corrects streams and ends them."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False
        self.refused: RequestRefused | None = None
        self._status, self._stream, self._kept = 200, False, b""

    async def take(self, message: Message) -> None:
        """One message of the inner server."""
        if message["type"] == "http.response.start":
            self._status = int(message["status"])
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._stream = kind.startswith(b"text/event-stream")
            if self._status < 400:
                self.begun = True
                await self._send(message)
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._status >= 400:
            self._kept += body
            if not more:
                self.refused = refused_by(self._status, self._kept)
            return
        if self._stream:
            body = _mended(body) + (b"" if more else b"data: [DONE]\n\n")
        await self._send({**message, "body": body})


def _mended(body: bytes) -> bytes:
    """A failure within a stream in the API's form."""
    start = b'data: {"error": "'
    if not body.startswith(start):
        return body
    try:
        said = json.loads(body[len(b"data: ") :])["error"]
    except (ValueError, KeyError):
        said = body.decode(errors="replace")
    return b"data: " + error_body(RequestRefused(500, str(said), "server_error")) + b"\n\n"


async def _read(receive: Receive) -> bytes:
    """The whole body.

    Raises:
        RequestRefused: too large.
        ClientGone: the client left within it.
    """
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > _LARGEST:
            raise RequestRefused(413, f"the body is larger than {_LARGEST} bytes")
        if not message.get("more_body", False):
            return b"".join(parts)


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == 503:
        headers.append(_RETRY)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
