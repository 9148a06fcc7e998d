"""Reads request bodies; refuses a body of a wrong type, or an incomplete, slow or large body."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Final

from turbofit.core.process.interpreter import in_thread
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.http.request_context import Receive, RequestContext, uncancel

#: All bodies together may take the memory of this number of the largest bodies.
_LARGEST_AT_ONCE: Final = 16
#: All bodies together may take at least these bytes of memory.
_LEAST_AT_ONCE: Final = 512 << 20
#: A body of at least this many bytes is large: other requests go on between its parts, and a thread
#: parses the body.
LARGE: Final = 256 << 10


class _Arrival:
    """A body that is being received."""

    timer: asyncio.TimerHandle

    def __init__(self, client: str, ends: float) -> None:
        self.client, self.task = client, asyncio.current_task()
        #: The time, by `time.monotonic`, by which the body must be complete.
        self.ends = ends
        self.size = 0
        #: Parts are joined into blocks of up to `LARGE` bytes, since a block that grows is copied
        #: again and again. Blocks take up to an eighth more memory than is counted.
        self._blocks: list[bytearray] = []
        self.refusal: Refusal | None = None

    def take(self, part: bytes) -> None:
        self.size += len(part)
        if self._blocks and len(self._blocks[-1]) < LARGE:
            self._blocks[-1] += part
        else:
            self._blocks.append(bytearray(part))

    def whole(self) -> bytes:
        return b"".join(self._blocks)

    def give_up(self, refusal: Refusal) -> None:
        self.refusal = refusal
        if self.task is not None:
            self.task.cancel()


class Bodies:
    """Reads bodies of up to ``most`` bytes, and counts their memory, in all and by client.

    Memory is counted as bytes arrive. A client's bodies may take at most as much memory as is still
    free, so a single client can fill half of the memory for bodies.
    """

    def __init__(self, most: int, config: GatewayConfig) -> None:
        self._config = config
        self.in_memory = 0
        #: The bytes of the bodies in memory, by client.
        self._held_bytes: dict[str, int] = {}
        #: Held while a part of a large body is taken in, or while a large body is copied.
        self._large = asyncio.Lock()
        self.limit(most)

    def limit(self, most: int) -> None:
        """Limit each body that is read from now on to ``most`` bytes."""
        self._most = most
        self._room = max(_LARGEST_AT_ONCE * most, _LEAST_AT_ONCE)

    async def read(
        self, headers: Mapping[bytes, bytes], receive: Receive, client: str = ""
    ) -> bytes:
        """Read a whole body and return it; until then its memory counts for ``client``.

        Raises:
            Refusal: the body is too large, too slow, encoded or cut short, or there is no memory
                for it.
        """
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            # LMDeploy has this rule, too. With this type, a browser first sends a preflight.
            raise Refusal("content_type")
        if headers.get(b"content-encoding", b"identity").lower() not in (b"identity", b""):
            raise Refusal("content_encoding")
        length = headers.get(b"content-length", b"")
        most = self._most  # `limit` may change the number before this body is complete
        if length.isdigit() and int(length) > most:
            raise Refusal("body_too_big", size=int(length), most=most)
        self.check_room(client)
        arrival = _Arrival(client, time.monotonic() + self._config.body_seconds)
        self._look_in(min(self._config.body_window_seconds, self._config.body_seconds), arrival)
        try:  # `asyncio.wait_for` would make a task for each request
            return await self._all(arrival, receive, most)
        except asyncio.CancelledError:
            if arrival.refusal is None:
                raise
            uncancel(arrival.task)
            raise arrival.refusal from None
        finally:
            arrival.timer.cancel()
            self.count(-arrival.size, client)

    async def take(self, request: RequestContext, receive: Receive) -> None:
        """Read a request's body, if it has one, and count its memory until `forget`."""
        if request.method == "POST":
            request.body = await self.read(request.headers, receive, request.who)
        request.bytes_in, request.read_at = len(request.body), time.perf_counter()
        self.count(request.bytes_in, request.who)

    def forget(self, request: RequestContext) -> None:
        """Drop a request's body, and count its memory as free.

        The body is not needed while an answer streams, which may take minutes.
        """
        if request.bytes_in and not request.forgotten:
            self.count(-request.bytes_in, request.who)
        request.forgotten, request.body = True, b""

    def count(self, size: int, client: str = "") -> None:
        """Count ``size`` bytes of a body that stays in memory.

        When the body is dropped, call this method again with the negative size.
        """
        self.in_memory += size
        held_bytes = self._held_bytes.get(client, 0) + size
        if held_bytes > 0:
            self._held_bytes[client] = held_bytes
        else:
            self._held_bytes.pop(client, None)

    def _look_in(self, seconds: float, arrival: _Arrival) -> None:
        loop = asyncio.get_running_loop()
        arrival.timer = loop.call_later(seconds, self._look, arrival, arrival.size)

    def _look(self, arrival: _Arrival, before: int) -> None:
        """Stop reading a body that is too late, or that came too slowly since the last look.

        ``before`` is the number of bytes that had come at the last look.
        """
        config = self._config
        window, left = config.body_window_seconds, arrival.ends - time.monotonic()
        came = arrival.size - before
        if left <= 0:
            why = f"the body did not arrive within {config.body_seconds:g} s"
            arrival.give_up(Refusal("slow_body", message=why))
        elif came < config.body_rate * window:
            why = (
                f"only {came} bytes of the body came in {window:g} s, and at least"
                f" {config.body_rate} bytes a second must come"
            )
            arrival.give_up(Refusal("slow_body", message=why))
        else:
            self._look_in(min(window, left), arrival)

    async def _all(self, arrival: _Arrival, receive: Receive, most: int) -> bytes:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refusal("incomplete_body")
            part: bytes = message.get("body", b"")
            more = bool(message.get("more_body"))
            arrival.take(part)
            self.count(len(part), arrival.client)
            if arrival.size > most:
                raise Refusal("body_too_big", size=arrival.size, most=most)
            self.check_room(arrival.client)
            if more and arrival.size >= LARGE:
                # Other due work runs before the next part of a large body is read. Otherwise each
                # pass of the event loop would copy a part of every large body, and a short text
                # would wait for all these copies at each of its steps.
                async with self._large:
                    await asyncio.sleep(0)
        arrival.timer.cancel()  # the body is complete, so its client cannot be late
        if arrival.size < LARGE:
            return arrival.whole()
        async with self._large:  # one copy at a time, since a copy holds Python's lock
            return await in_thread(arrival.whole)

    def check_room(self, client: str) -> None:
        """Refuse a request if the bodies of its client take more memory than is left free.

        Bytes that were counted for the request stay counted; the caller must subtract these bytes.

        Raises:
            Refusal: all bodies, or the bodies of this client, take too much of the memory.
        """
        held_bytes, free = self._held_bytes.get(client, 0), self._room - self.in_memory
        if held_bytes <= free:
            return
        if not held_bytes:
            raise Refusal("busy:bodies", retry_after=1)
        raise Refusal(
            "too_many_bodies", taken=held_bytes, left=max(0, free), room=self._room, retry_after=1
        )
