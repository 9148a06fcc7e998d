"""Sends one item until it is answered, or fails for a reason of its own.

The request names a model, has its images inline, and asks for no stream. If the server is away,
busy or starting, the item waits and is sent again. A batch waits for its own server as long as the
server runs or restarts. A batch waits for another server ``patience`` seconds, then ends; the same
command continues it. If an item's connections to another server break `_MOST_BREAKS` times, the
item may be the cause, and fails.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import aiohttp
import msgspec

from turbofit.batch_jobs.output_file import BatchItem, BatchLine, ItemError
from turbofit.core.errors import UnservedError
from turbofit.core.struct import JsonObject
from turbofit.core.units import MIB, doubled
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.http.routes import first_model
from turbofit.gateway.media.pictures import from_bytes, from_url
from turbofit.measure.load.client import ServerClient, body_of, stated_pause
from turbofit.measure.load.prompt import NO_JSON

#: The most bytes of an image's file. A plan has the same limit (`planning/plan_document.py`).
LARGEST_IMAGE: Final = 32 * MIB
#: Errors that a body raises if its form is wrong, or if JSON cannot hold its texts or numbers.
_NO_BODY: Final = (
    msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError, AttributeError, LookupError,
    TypeError,
)  # fmt: skip
_LARGEST_ANSWER: Final = 64 << 20
_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0
_LONGEST_RETRY_AFTER: Final = 60.0
#: If this many seconds pass between two failures, the second failure begins a new outage. Pauses
#: between two tries are shorter.
_SILENCE: Final = 90.0
#: An item fails after this many broken connections to a server that the batch did not start.
_MOST_BREAKS: Final = 8
#: An item fails after this many answers with a status like 500, or tries without an answer in time.
_MOST_ERRORS: Final = 3
#: Reasons for a missing answer that count against the item.
_NO_ANSWER: Final = "no answer in time"
_BROKE: Final = "the connection broke"
#: The reason for a missing answer, by exception; the first line that matches counts.
_REASONS: Final = (
    ((aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError), "no connection"),
    (asyncio.TimeoutError, _NO_ANSWER),
    (Exception, _BROKE),
)
_AWAY: Final = frozenset({408, 425, 429, 502, 503, 504})


def request_body(
    item: BatchItem, model: str, *, replace: bool, base: str, max_tokens: int | None
) -> bytes:
    """Return the body to send for an item, with the contents of its files.

    Items without a model get ``model``; with ``replace`` all items get it. Relative paths of images
    begin in the folder ``base``. ``max_tokens`` limits answers to items that state no limit.

    Raises:
        ItemError: the item cannot be sent.
    """
    try:
        body = msgspec.json.decode(msgspec.json.encode(item.body))  # a copy: the item stays
        if body.get("stream"):
            raise ItemError("bad_stream", "a batch has no streams: leave stream out")
        if replace or body.get("model") is None:
            body["model"] = model
        if max_tokens and not (body.get("max_tokens") or body.get("max_completion_tokens")):
            body["max_tokens"] = max_tokens
        for message in body.get("messages", ()):
            content = message.get("content")
            for part in content if isinstance(content, list) else ():
                if part.get("type") == "image_url":
                    source = part["image_url"]
                    source = {"url": source} if isinstance(source, str) else source
                    part["image_url"] = {**source, "url": _inline(source["url"], base)}
        return msgspec.json.encode(body)
    except _NO_BODY as exc:
        raise ItemError("bad_line", f"the body cannot be sent: {exc}") from None


def _inline(url: str, base: str) -> str:
    """Return an image as a data URL; ``url`` is a data URL, a file URL, or a path from ``base``.

    A web address is returned unchanged: the server fetches the image.
    """
    kind, name = url.partition(":")[0].lower(), "an image"
    if kind in ("http", "https"):
        return url
    try:
        if kind == "data":
            return from_url(url, LARGEST_IMAGE).inline
        name = unquote(urlsplit(url).path) if kind == "file" else os.path.join(base, url)
        if not os.path.isfile(name):  # reading a pipe could block for ever
            raise ItemError("image_missing", f"{name} is no file")
        with open(name, "rb") as file:
            return from_bytes(file.read(LARGEST_IMAGE + 1), LARGEST_IMAGE).inline
    except Refusal as exc:
        raise ItemError(exc.reason, f"{name}: {exc.message}") from None
    except (OSError, ValueError) as exc:
        raise ItemError("image_unreadable", f"{name}: {exc}") from None


class Sender(ServerClient):
    """Sends items to one server, and makes output lines of its answers.

    An answer may take ``timeout`` seconds. The server may be away for ``patience`` seconds, or for
    any time if ``patience`` is None: then the batch has started the server itself.
    """

    def __init__(
        self, url: str, key: str | None, *, timeout: float, patience: float | None
    ) -> None:
        super().__init__(url, key, timeout=timeout)
        self._patience = patience
        #: Why no item makes progress now; empty while items make progress.
        self.waits = ""
        self._away_since: float | None = None
        self._failed_at = 0.0
        #: The number of answers to requests that the server says it lowered.
        self.lowered = 0

    async def model(self) -> str:
        """Return the name of the server's first model.

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
        """Send an item and return its line; ``make_body`` makes its body, and may read files.

        Raises:
            UnservedError: the server is away for more than ``patience`` seconds.
            UsageError: the server does not know the key.
        """
        response = error = None
        try:
            if item.fault is not None:
                raise item.fault
            body = await asyncio.to_thread(make_body, item)
            status, headers, raw = await self._answer("POST", item.url, body)
            response, error = _read(status, headers, raw)
            if error is None and "x-turbofit-limited" in headers:
                self.lowered += 1
        except ItemError as exc:
            error = _failed(exc.code, exc.message)
        except (aiohttp.InvalidURL, ValueError) as exc:
            error = _failed("bad_url", f"{item.url!r} is no path: {exc}")
        return BatchLine(id=item.line_id, custom_id=item.custom_id, response=response, error=error)

    async def _answer(self, method: str, path: str, body: bytes | None) -> tuple[int, Any, bytes]:
        """Send a request until the server answers; return the answer's status, headers and body.

        If the server is away or busy, the request is sent again. After an error of the server (500
        or higher) it is sent again a few times.
        """
        tries = breaks = errors = 0
        while True:
            headers: Any = {}
            try:
                status, headers, raw = await self._exchange(method, path, body)
                why = f"status {status}" if status in _AWAY else ""
                if not why:
                    errors += 1
                    if status < 500 or errors >= _MOST_ERRORS:
                        self._away_since, self.waits = None, ""
                        return status, headers, raw
            except aiohttp.InvalidURL:
                raise
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as exc:
                why = next(why for kinds, why in _REASONS if isinstance(exc, kinds))
                if why == _NO_ANSWER:
                    errors += 1
                if why == _BROKE and self._patience is not None:
                    breaks += 1
                # Only an item fails; the request for the model's name has no body, and is repeated.
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
        """Send a request once; return status, headers and body of the answer.

        Raises:
            UsageError: the server does not know the key.
        """
        headers = {"Content-Type": "application/json"} if body is not None else {}
        async with self._session.request(
            method, self._url + path, data=body, headers=headers, allow_redirects=False
        ) as response:
            if response.status == 401:  # a wrong key ends the batch, not only the item
                raise self._unknown_key(401)
            return response.status, response.headers, await body_of(response, _LARGEST_ANSWER)

    def _away(self, why: str) -> None:
        """Note that the server is away or busy.

        Raises:
            UnservedError: the server has been away for more than ``patience`` seconds.
        """
        now = time.monotonic()
        if self._away_since is None or now > self._failed_at + _SILENCE:
            self._away_since = now
        self._failed_at, self.waits = now, f"waiting for the server: {why}"
        away = now - self._away_since
        if self._patience is not None and away > self._patience:
            raise UnservedError(
                f"{self._url} has not answered for {away:.0f} s: {why}",
                hint="start the server again and give the same command: it sends only items without"
                " a line",
            )


def _read(status: int, headers: Any, raw: bytes) -> tuple[JsonObject, JsonObject | None]:
    """Return the response and the error of an item's line, from a server's answer."""
    error = None
    try:
        answer = msgspec.json.decode(raw)  # refuses JSON that `format` below accepts
        body: Any = msgspec.Raw(msgspec.json.format(raw, indent=-1) if b"\n" in raw else raw)
        if not 200 <= status < 300:
            words = answer.get("error", answer) if isinstance(answer, dict) else {}
            words = words if isinstance(words, dict) else {}
            code, message = words.get("code"), words.get("message")
            error = _failed(code or f"status_{status}", message or f"the server answered {status}")
    except NO_JSON:
        body = raw[:4096].decode(errors="replace")
        error = _failed("bad_answer", f"status {status} without JSON")
    request_id = headers.get("x-request-id", "")
    return {"status_code": status, "request_id": request_id, "body": body}, error


def _failed(code: Any, message: Any) -> JsonObject:
    """Return the error of an output line."""
    return {"code": str(code), "message": str(message)}
