"""Sends one item until there is an answer to it, or a failure that is the item's alone.

A server that is away, busy or starting does not fail an item: the item waits and is sent again.
Turbofit's server is waited for as long as it comes back; another one for ``patience``, after which
the batch ends and can go on later. An item whose connection breaks again and again behind a server
that is not turbofit's may be what breaks it: it fails after `_MOST_BREAKS`.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import msgspec

from turbofit.batch.item import BatchError, BatchLine, BatchResponse, ItemError
from turbofit.core.errors import UnservedError
from turbofit.load.client import ServerClient, body_of, first_model, stated_pause

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.batch.item import BatchItem

_LARGEST_ANSWER: Final = 64 << 20
_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0
_LONGEST_RETRY_AFTER: Final = 60.0
#: Longer than any pause: a server that fails so seldom took requests meanwhile, and is not away.
_SILENCE: Final = 90.0
#: Broken connections of one item, at a server that is not ours: each may have been its death.
_MOST_BREAKS: Final = 8
#: Answers of 500 and the like, and answers that took too long: the item's failure then.
_MOST_ERRORS: Final = 3
_AWAY: Final = frozenset({408, 425, 429, 502, 503, 504})
_NO_JSON: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class Sender(ServerClient):
    """Asks one server for the lines of items.

    Args:
        url: its address.
        key: its API key, where it has one.
        timeout: the longest that an answer may take, in seconds.
        patience: how long it may be away; None is for ever, as of a server that is ours.
    """

    def __init__(
        self, url: str, key: str | None, *, timeout: float, patience: float | None
    ) -> None:
        super().__init__(url, key, timeout=timeout)
        self._patience = patience
        #: Why nothing goes on at this moment.
        self.waits = ""
        self._away_since: float | None = None
        self._failed_at = 0.0
        #: Answers whose request the server says it lowered.
        self.lowered = 0

    async def model(self) -> str:
        """The first model of the server.

        Raises:
            UnservedError: it does not answer, or not as such a server does.
            UsageError: it does not know the key.
        """
        try:
            status, _, raw = await self._answer("GET", "/v1/models", None)
        except (aiohttp.InvalidURL, ValueError):
            raise self._no_address() from None
        with suppress(*_NO_JSON):
            if name := first_model(status, msgspec.json.decode(raw)):
                return name
        raise UnservedError(
            f"{self._url}/v1/models answers {status} and names no model",
            hint="name an OpenAI-compatible server, or its model with --model",
        )

    async def line(self, item: BatchItem, body_of: Callable[[BatchItem], bytes]) -> BatchLine:
        """The line of an item; ``body_of`` makes its body, and may read files.

        Raises:
            UnservedError: the server is away for longer than it is waited for.
            UsageError: the server does not know the key.
        """
        response = error = None
        try:
            if item.fault is not None:
                raise item.fault
            body = await asyncio.to_thread(body_of, item)
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
        """Status, headers and body of an answer, after as many tries as that takes."""
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
                why = "the connection broke"
                if isinstance(exc, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
                    why = "no connection"
                elif isinstance(exc, asyncio.TimeoutError):
                    why = "no answer in time"
                    errors += 1
                elif self._patience is not None:
                    breaks += 1
                if body is not None and (breaks >= _MOST_BREAKS or errors >= _MOST_ERRORS):
                    times = max(breaks, errors)
                    raise ItemError("connection_lost", f"{times} times: {why}") from None
            if why:
                self._away(why)
            # From try to try longer, with a random part, so that items spread out.
            pause = min(_LONGEST_PAUSE, _PAUSE * 2.0 ** min(tries, 10)) * random.uniform(0.5, 1.0)
            tries += 1
            await asyncio.sleep(max(pause, stated_pause(headers, _LONGEST_RETRY_AFTER)))

    async def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, Any, bytes]:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        async with self._session.request(
            method, self._url + path, data=body, headers=headers, allow_redirects=False
        ) as response:
            if response.status == 401:  # which is no item's failure
                raise self._unknown_key(401)
            raw = await body_of(response, _LARGEST_ANSWER + 1)
            if len(raw) > _LARGEST_ANSWER:
                raise ItemError("answer_too_big", f"more than {_LARGEST_ANSWER} bytes")
            return response.status, response.headers, raw

    def _away(self, why: str) -> None:
        """The server does not answer, or is busy.

        Raises:
            UnservedError: for longer than ``patience``.
        """
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
    """What an item's line says of an answer."""
    try:
        answer = msgspec.json.decode(raw)  # `format` is more lenient
        body: Any = msgspec.Raw(msgspec.json.format(raw, indent=-1) if b"\n" in raw else raw)
        error = None if 200 <= status < 300 else _error(status, answer)
    except _NO_JSON:
        body = raw[:4096].decode(errors="replace")
        error = BatchError(code="bad_answer", message=f"status {status} without JSON")
    request_id = headers.get("x-request-id", "")
    return BatchResponse(status_code=status, request_id=request_id, body=body), error


def _error(status: int, body: Any) -> BatchError:
    """The server's words, where it has any."""
    words = body.get("error", body) if isinstance(body, dict) else None
    words = words if isinstance(words, dict) else {}
    code, message = words.get("code"), words.get("message")
    return BatchError(
        code=code if isinstance(code, str) and code else f"status_{status}",
        message=message if isinstance(message, str) else f"the server answered {status}",
    )
