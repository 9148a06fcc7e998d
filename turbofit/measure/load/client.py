"""Sends a request to a server, reads its streamed answer, and names each kind of error."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import msgspec
from typing_extensions import Self

from turbofit.core.errors import UnservedError, UsageError
from turbofit.core.messages import PRETEND_HEADER
from turbofit.core.struct import JsonObject
from turbofit.gateway.http.about import About, ClockFacts
from turbofit.gateway.http.routes import first_model
from turbofit.measure.load.prompt import LARGEST_ERROR, NO_JSON, StreamError, event_of

#: The most bytes of a line in a stream; a server of text never sends a longer line.
_LONGEST_LINE: Final = 1 << 20
_TEXTS: Final = ("content", "reasoning_content", "reasoning")
_SHOWN: Final = 200
#: The most bytes of a server's page `/about` that are read.
_LARGEST_ABOUT: Final = 1 << 20
_CONNECT_SECONDS: Final = 10.0
#: Seconds, below uvicorn's 5: no request uses a connection that the server closes.
_KEEP_ALIVE: Final = 3.0
_LONGEST_PAUSE: Final = 30.0
_READ_BUFFER: Final = 1 << 18
_CHAT: Final = "/v1/chat/completions"
#: The name of an error by its type; the first type in the list counts.
_KINDS: Final = (
    (aiohttp.ClientConnectorError, "no connection"),
    (aiohttp.SocketTimeoutError, "stalled"),
    (asyncio.TimeoutError, "timeout"),
    (aiohttp.ClientPayloadError, "cut short"),
)


@dataclass(slots=True)
class Answer:
    """The answer to one request; times are those of `time.perf_counter`.

    ``counts``: the request began in the measured window. ``kind``: the name of the error; empty
    without an error. ``example``: the error's text. ``pieces``: the times at which pieces of text
    came. ``cached_tokens``: tokens of the prompt that the server had in its prefix cache, by its
    own count. ``pretend``: the server has pretend GPUs. ``whole``: the answer came in one piece, so
    that nobody knows when its tokens came. ``turn`` is the number of the request in its
    conversation, and ``said`` are the messages so far, for the next turn.
    """

    begun: float
    counts: bool = False
    ended: float | None = None
    kind: str = ""
    example: str = ""
    pieces: array[float] = field(default_factory=lambda: array("d"))
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    retry_after: float = 0.0
    pretend: bool = False
    whole: bool = False
    turn: int = 1
    said: Sequence[JsonObject] = ()
    text: str = ""

    def divide(self, by: float) -> None:
        """Divide all times by ``by``: a request takes ``by`` times as long as on the card."""
        self.begun /= by
        self.ended = None if self.ended is None else self.ended / by
        self.pieces = array("d", (at / by for at in self.pieces))

    @property
    def answered(self) -> bool:
        return self.ended is not None and not self.kind

    @property
    def tokens(self) -> int:
        """The number of tokens by the server's count; without a count, the number of pieces.

        A piece may have several tokens.
        """
        return len(self.pieces) if self.output_tokens is None else self.output_tokens

    @property
    def ttft(self) -> float | None:
        """Seconds to the first piece of text; None if no text came."""
        return self.pieces[0] - self.begun if self.pieces else None

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first; None if there are fewer than two tokens."""
        if not self.pieces or self.tokens <= 1:
            return None
        return (self.pieces[-1] - self.pieces[0]) / (self.tokens - 1)

    @property
    def e2e(self) -> float | None:
        """Seconds from the request to the end of the answer; None before that end."""
        return None if self.ended is None else self.ended - self.begun


class StreamReader:
    """Reads the events of a streamed chat completion into an `Answer`."""

    def __init__(self, answer: Answer) -> None:
        self._answer, self._rest = answer, b""
        #: The times of all events, with or without text. They count if no event has text.
        self._events: array[float] = array("d")
        self._texts: list[str] = []
        #: Whether ``[DONE]`` came; whether a choice named its reason to end.
        self._done = self._finished = False

    def feed(self, data: bytes, at: float) -> None:
        """Read the bytes of the body that came at the time ``at``.

        Raises:
            StreamError: the bytes are no events of an answer.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            raise StreamError("garbage", self._rest)
        for line in lines:
            event = event_of(line.strip())
            if event:
                self._event(event, at)
            self._done |= event == {}

    def end(self) -> None:
        """Check that the stream is complete.

        Raises:
            StreamError: the stream was cut short, or had no content.
        """
        if not self._events:
            raise StreamError("empty answer")
        if not (self._done or self._finished):
            raise StreamError("cut short")
        if not self._answer.pieces:
            self._answer.pieces = self._events
        self._answer.text = "".join(self._texts)
        if self._answer.output_tokens == 0:
            raise StreamError("empty answer")

    def _event(self, event: JsonObject, at: float) -> None:
        """Note the text, the end and the usage in an event."""
        choices = event["choices"] if isinstance(event["choices"], list) else []
        choices = [choice for choice in choices if isinstance(choice, dict)]
        if choices:
            self._events.append(at)
        if any(_has_text(choice.get("delta")) for choice in choices):
            self._answer.pieces.append(at)
            said = (choices[0].get("delta") or {}).get("content")
            self._texts.append(said if isinstance(said, str) else "")
        if any(choice.get("finish_reason") for choice in choices):
            self._finished = True
        usage = event.get("usage")
        if isinstance(usage, dict):
            _note_usage(usage, self._answer)


def read_whole(body: bytes, answer: Answer) -> None:
    """Read a chat completion that came in one piece into an `Answer`.

    Raises:
        StreamError: the bytes are no completion, or its answer is empty.
    """
    try:
        document = msgspec.json.decode(body)
        message = document["choices"][0]["message"]
    except (*NO_JSON, LookupError, TypeError):
        raise StreamError("garbage", body) from None
    if isinstance(document.get("usage"), dict):
        _note_usage(document["usage"], answer)
    if answer.output_tokens == 0 or (answer.output_tokens is None and not _has_text(message)):
        raise StreamError("empty answer")


def _note_usage(usage: JsonObject, answer: Answer) -> None:
    answer.prompt_tokens = _count(usage.get("prompt_tokens"))
    answer.output_tokens = _count(usage.get("completion_tokens"))
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict):
        answer.cached_tokens = _count(details.get("cached_tokens"))


def _has_text(delta: Any) -> bool:
    if not isinstance(delta, dict):
        return False
    texts = (delta.get(name) for name in _TEXTS)
    return any(isinstance(text, str) and text for text in texts) or bool(delta.get("tool_calls"))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


class ServerClient:
    """Connections to one OpenAI-compatible server; a context manager.

    ``url``: the server's address, with or without ``/v1``. ``timeout``: the longest time of an
    answer in seconds; ``silence``: the longest time without a byte.
    """

    def __init__(
        self, url: str, key: str | None, *, timeout: float, silence: float | None = None
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE),
            timeout=aiohttp.ClientTimeout(
                total=timeout, sock_connect=_CONNECT_SECONDS, sock_read=silence
            ),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            trust_env=False,
            read_bufsize=_READ_BUFFER,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    def _no_address(self) -> UsageError:
        return UsageError(
            f"{self._url} is no address of a server", hint="write it as http://127.0.0.1:23333"
        )

    def _unknown_key(self, status: int) -> UsageError:
        return UsageError(
            f"{self._url} answers {status}: it does not know the key",
            hint="give its key with --api-key, or in TURBOFIT_API_KEY",
        )


def stated_pause(headers: Mapping[str, str], most: float) -> float:
    """Return the seconds of ``Retry-After``, at most ``most``; 0 if the header states no number."""
    stated = headers.get("Retry-After", "")
    return min(float(stated), most) if stated.isdecimal() else 0.0


async def body_of(response: aiohttp.ClientResponse, most: int) -> bytes:
    """Read the first bytes of a body, at most ``most``, over several packets if necessary."""
    pieces = []
    while data := await response.content.read(most):
        pieces.append(data)
        most -= len(data)
    return b"".join(pieces)


class LoadClient(ServerClient):
    """Sends the requests of a load, and times their answers."""

    async def model(self) -> str:
        """Return the name of the server's first model.

        Raises:
            UnservedError: the server does not answer as an OpenAI-compatible server does.
            UsageError: the server refuses this client, or the URL is no address.
        """
        try:
            async with self._session.request("GET", f"{self._url}/v1/models") as response:
                raw = await body_of(response, LARGEST_ERROR)
        except (aiohttp.InvalidURL, ValueError):
            raise self._no_address() from None
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as exc:
            raise UnservedError(
                f"{self._url} does not answer: {_kind(exc)}",
                hint="start a server first (turbofit serve MODEL), or name another address",
            ) from None
        if response.status == 200 and (name := first_model(raw)):
            return name
        if response.status in (401, 403):
            raise self._unknown_key(response.status)
        raise UnservedError(
            f"{self._url}/v1/models answers {response.status}", hint="name its model with --model"
        )

    async def clock(self) -> ClockFacts | None:
        """Return how time passes on the server's pretend GPUs; None from another server."""
        try:
            async with self._session.get(f"{self._url}/about") as response:
                raw = await body_of(response, _LARGEST_ABOUT)
            return msgspec.json.decode(raw, type=About).clock
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, *NO_JSON):
            return None  # another program's server

    async def ask(self, body: JsonObject) -> Answer:
        """Send one request and return its answer; an error is noted in the answer."""
        data = msgspec.json.encode(body)
        answer = Answer(time.perf_counter(), whole=not body.get("stream"))
        try:
            async with self._session.post(
                self._url + _CHAT, data=data, headers={"Content-Type": "application/json"}
            ) as response:
                answer.pretend = PRETEND_HEADER in response.headers
                await self._read(response, answer)
        except (StreamError, aiohttp.ClientError, asyncio.TimeoutError, OSError) as exc:
            answer.ended, answer.kind = time.perf_counter(), _kind(exc)
            answer.example = " ".join(str(exc).split())[:_SHOWN]
        return answer

    async def _read(self, response: aiohttp.ClientResponse, answer: Answer) -> None:
        if response.status != 200:
            answer.retry_after = stated_pause(response.headers, _LONGEST_PAUSE)
            raise StreamError(f"status {response.status}", await body_of(response, LARGEST_ERROR))
        if answer.whole:
            read_whole(await response.read(), answer)
            answer.ended = time.perf_counter()
            return
        if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
            raise StreamError("no stream", await body_of(response, LARGEST_ERROR))
        reader = StreamReader(answer)
        while data := await response.content.readany():
            reader.feed(data, time.perf_counter())
        reader.end()
        answer.ended = time.perf_counter()


def _kind(exc: Exception) -> str:
    if isinstance(exc, StreamError):
        return exc.kind
    return next((kind for type_, kind in _KINDS if isinstance(exc, type_)), "connection broken")
