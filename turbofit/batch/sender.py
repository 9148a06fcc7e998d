"""Sends one item until it is answered, or fails for a reason of its own.

Its body is complete, with its model, without a stream, and with its images inline. A server that is
away, busy or starting fails no item: the item waits and is sent again. The batch's own server is
waited for as long as it restarts; another server for ``patience`` seconds, after which the batch
ends and can be continued later. An item whose connection to another server breaks `_MOST_BREAKS`
times may be the cause, and fails.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

import aiohttp
import msgspec

from turbofit.batch.output_file import BatchError, BatchLine, BatchResponse, ItemError
from turbofit.core.errors import UnservedError
from turbofit.core.units import MIB, doubled, format_bytes
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.http.routes import first_model
from turbofit.gateway.media.pictures import from_bytes, from_url
from turbofit.load.client import ServerClient, body_of, stated_pause
from turbofit.load.events import NO_JSON

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from turbofit.batch.output_file import BatchItem
    from turbofit.core.json_types import JsonObject

#: The most bytes of an image's file, as many as a plan allows (`tuner/explain/plan_document.py`).
LARGEST_IMAGE: Final = 32 * MIB


def request_body(
    item: BatchItem, model: str, *, replace: bool, base: str, max_tokens: int | None
) -> bytes:
    """The body to send for an item; reads the item's files.

    ``model`` is for items that name none, or with ``replace`` for all; paths of images begin in
    ``base``; ``max_tokens`` limits answers to items that state no limit.

    Raises:
        ItemError: the item cannot be sent.
    """
    try:
        body = decoded_body(item)
        if body.get("stream"):
            raise ItemError("bad_stream", "a batch has no streams: leave stream out")
        if replace or body.get("model") is None:
            body["model"] = model
        bound_answer(body, max_tokens)
        inlined(body, base)
        return msgspec.json.encode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError) as exc:
        raise ItemError("bad_line", f"the body cannot be sent: {exc}") from None


def decoded_body(item: BatchItem) -> JsonObject:
    """The body of an item, decoded as a new object that may be changed.

    Raises:
        MsgspecError: it is not JSON; `RecursionError` and `UnicodeError` mean that, too.
    """
    raw = item.body
    text = raw if isinstance(raw, msgspec.Raw) else msgspec.json.encode(raw)
    body: JsonObject = msgspec.json.decode(text)
    return body


def bound_answer(body: JsonObject, tokens: int | None) -> None:
    """Limit the answer to ``tokens`` tokens, if the body states no limit."""
    if tokens and body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        body["max_tokens"] = tokens


def image_sources(body: JsonObject) -> Iterator[JsonObject]:
    """Each object in a chat request whose ``url`` is an image."""
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or part.get("type") != "image_url":
                continue
            source = part.get("image_url")
            if isinstance(source, str):
                source = part["image_url"] = {"url": source}
            if isinstance(source, dict) and isinstance(source.get("url"), str):
                yield source


def is_remote(url: str) -> bool:
    """Whether the server fetches this URL."""
    return url[:8].lower().startswith(("http://", "https://"))


def local_path(url: str, base: str) -> str | None:
    """The file that an item's URL names; None for a ``data:`` URL; `ItemError` for a bad one."""
    if url[:5].lower() == "data:":
        return None
    if url[:5].lower() == "file:":
        try:
            return unquote(urlsplit(url).path)
        except ValueError as exc:
            raise ItemError("image_missing", f"{url} is no URL of a file: {exc}") from None
    return os.path.join(base, url)


def inlined(body: JsonObject, base: str) -> None:
    """Replace the local images of a body by inline ones; an `ItemError` for a bad image."""
    for number, source in enumerate(image_sources(body), 1):
        url: str = source["url"]
        if is_remote(url):
            continue
        path = local_path(url, base)
        what = f"image {number}" if path is None else path
        try:
            if path is None:
                picture = from_url(url, LARGEST_IMAGE)
            else:
                picture = from_bytes(_file_bytes(path), LARGEST_IMAGE)
            source["url"] = picture.inline
        except Refusal as exc:
            raise ItemError(exc.reason, f"{what}: {exc.message}") from None


def _file_bytes(path: str) -> bytes:
    if not os.path.isfile(path):  # a pipe would block
        raise ItemError("image_missing", f"{path} is no file that is there")
    try:
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            if before.st_size > LARGEST_IMAGE:
                size, limit = format_bytes(before.st_size), format_bytes(LARGEST_IMAGE)
                raise ItemError("image_too_big", f"{path} has {size}, the limit is {limit}")
            data = file.read(before.st_size + 1)
            after = os.fstat(file.fileno())
    except OSError as exc:
        raise ItemError("image_unreadable", f"{path}: {exc.strerror or exc}") from None
    if (len(data), before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ItemError("image_changed", f"{path} changed while it was read")
    return data


_LARGEST_ANSWER: Final = 64 << 20
_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0
_LONGEST_RETRY_AFTER: Final = 60.0
#: Failures more seconds apart than this, which is longer than any pause, are not one outage.
_SILENCE: Final = 90.0
#: Broken connections of one item, to a server that is not ours, after which it fails.
_MOST_BREAKS: Final = 8
#: Answers like 500, and answers that took too long, after which the item fails.
_MOST_ERRORS: Final = 3
#: Why a request has no answer, if the reason counts against its item.
_NO_ANSWER: Final = "no answer in time"
_BROKE: Final = "the connection broke"
_AWAY: Final = frozenset({408, 425, 429, 502, 503, 504})


class Sender(ServerClient):
    """Asks one server for the lines of items.

    An answer may take ``timeout`` seconds; the server may be away for ``patience`` seconds; None
    waits for ever, for a server that is our own.
    """

    def __init__(
        self, url: str, key: str | None, *, timeout: float, patience: float | None
    ) -> None:
        super().__init__(url, key, timeout=timeout)
        self._patience = patience
        #: Why no item makes progress now; empty if items do.
        self.waits = ""
        self._away_since: float | None = None
        self._failed_at = 0.0
        #: The number of answers whose requests the server has lowered, by its header.
        self.lowered = 0

    async def model(self) -> str:
        """The first model of the server.

        Raises:
            UnservedError: the server does not answer, or lists no model.
        """
        try:
            status, _, raw = await self._answer("GET", "/v1/models", None)
        except (aiohttp.InvalidURL, ValueError):
            raise self._no_address() from None
        if status == 200 and (name := first_model(raw)):
            return name
        raise UnservedError(
            f"{self._url}/v1/models answers {status} and names no model",
            hint="name an OpenAI-compatible server, or its model with --model",
        )

    async def line(self, item: BatchItem, make_body: Callable[[BatchItem], bytes]) -> BatchLine:
        """The line of an item; ``make_body`` makes its body, and may read files.

        Raises:
            UnservedError: the server is away for more than ``patience`` seconds.
            UsageError: the server does not know the key.
        """
        response = error = None
        try:
            if item.fault is not None:
                raise item.fault
            body = await asyncio.to_thread(make_body, item)
            try:
                status, headers, raw = await self._answer("POST", item.url, body)
            except (aiohttp.InvalidURL, ValueError) as exc:
                raise ItemError("bad_url", f"{item.url!r} is no path: {exc}") from None
            response, error = _read(status, headers, raw)
            self.lowered += error is None and "x-turbofit-limited" in headers
        except ItemError as exc:
            error = BatchError(code=exc.code, message=exc.message)
        return BatchLine(id=item.line_id, custom_id=item.custom_id, response=response, error=error)

    async def _answer(self, method: str, path: str, body: bytes | None) -> tuple[int, Any, bytes]:
        """The status, headers and body of an answer, after as many tries as it takes."""
        tries = breaks = errors = 0
        while True:
            headers: Any = {}
            try:
                status, headers, raw = await self._exchange(method, path, body)
                why = f"status {status}" if status in _AWAY else ""
                errors += status >= 500 and not why
                if not why:
                    self._away_since, self.waits = None, ""
                    if status < 500 or errors >= _MOST_ERRORS:
                        return status, headers, raw
            except aiohttp.InvalidURL:
                raise
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as exc:
                why = _why_not(exc)
                errors += why == _NO_ANSWER
                breaks += why == _BROKE and self._patience is not None
                if body is not None and (breaks >= _MOST_BREAKS or errors >= _MOST_ERRORS):
                    times = max(breaks, errors)
                    raise ItemError("connection_lost", f"{times} times: {why}") from None
            if why:
                self._away(why)
            # The pause grows with each try, and has a random part, so that items spread out.
            pause = doubled(_PAUSE, tries, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)
            tries += 1
            await asyncio.sleep(max(pause, stated_pause(headers, _LONGEST_RETRY_AFTER)))

    async def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, Any, bytes]:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        async with self._session.request(
            method, self._url + path, data=body, headers=headers, allow_redirects=False
        ) as response:
            if response.status == 401:  # not the item's failure
                raise self._unknown_key(401)
            raw = await body_of(response, _LARGEST_ANSWER + 1)
            if len(raw) > _LARGEST_ANSWER:
                raise ItemError("answer_too_big", f"more than {_LARGEST_ANSWER} bytes")
            return response.status, response.headers, raw

    def _away(self, why: str) -> None:
        """Note that the server is away or busy; an `UnservedError` after ``patience`` seconds."""
        now = time.monotonic()
        if self._away_since is None or now > self._failed_at + _SILENCE:
            self._away_since = now
        self._failed_at = now
        away = now - self._away_since
        self.waits = f"waiting for the server: {why}"
        if self._patience is not None and away > self._patience:
            raise UnservedError(
                f"{self._url} has not answered for {away:.0f} s: {why}",
                hint="start it again and give the same command: all lines of the output count",
            )


def _read(status: int, headers: Any, raw: bytes) -> tuple[BatchResponse, BatchError | None]:
    """The response and the error of an item's line, from a server's answer."""
    try:
        answer = msgspec.json.decode(raw)  # `format` is more lenient
        body: Any = msgspec.Raw(msgspec.json.format(raw, indent=-1) if b"\n" in raw else raw)
        error = None if 200 <= status < 300 else _error(status, answer)
    except NO_JSON:
        body = raw[:4096].decode(errors="replace")
        error = BatchError(code="bad_answer", message=f"status {status} without JSON")
    request_id = headers.get("x-request-id", "")
    return BatchResponse(status_code=status, request_id=request_id, body=body), error


def _error(status: int, body: Any) -> BatchError:
    """The error with the server's own code and message, if it has any."""
    words = body.get("error", body) if isinstance(body, dict) else None
    words = words if isinstance(words, dict) else {}
    code, message = words.get("code"), words.get("message")
    return BatchError(
        code=code if isinstance(code, str) and code else f"status_{status}",
        message=message if isinstance(message, str) else f"the server answered {status}",
    )


def _why_not(exc: Exception) -> str:
    """Why a request has no answer: no connection, no answer in time, or a broken connection."""
    if isinstance(exc, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return "no connection"
    return _NO_ANSWER if isinstance(exc, asyncio.TimeoutError) else _BROKE
