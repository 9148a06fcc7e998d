"""Request bodies: of the right kind, whole, in time, and no more than there is room for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from turbofit.gateway.refusals import Refusal
from turbofit.gateway.tasks import uncancel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, MutableMapping

    Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

__all__ = ["Bodies"]

#: Bytes of all bodies held at once: so many of the largest, at least.
_LARGEST_AT_ONCE: Final = 8
_LEAST_AT_ONCE: Final = 256 << 20


class Bodies:
    """Reads bodies.

    Args:
        most: bytes of one.
        seconds: how long it may take to arrive.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self._seconds = seconds
        self.in_memory = 0
        self.limit(most)

    def limit(self, most: int) -> None:
        """So many bytes at most, of bodies that are read from now on."""
        self._most = most
        self._room = max(_LARGEST_AT_ONCE * most, _LEAST_AT_ONCE)

    @property
    def roomy(self) -> bool:
        """Whether there is room to hold bodies that were sent already, in case they fail there."""
        return self.in_memory <= self._room // 2

    async def read(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        """A whole body.

        Raises:
            Refusal: not JSON, compressed, too large, too slow, or no room for it now.
        """
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            # It is LMDeploy's rule too, and what makes a browser ask before it sends.
            raise Refusal(415, "content_type", "the body must be application/json")
        if headers.get(b"content-encoding", b"identity").lower() not in (b"identity", b""):
            raise Refusal(415, "content_encoding", "compressed bodies are not taken")
        length = headers.get(b"content-length", b"")
        most = self._most  # another one may be in force before this body is here
        if length.isdigit() and int(length) > most:
            raise _too_big(int(length), most)
        if self.in_memory > self._room:
            raise Refusal(503, "busy", "the gateway holds too many bodies", retry_after=1)
        return await self._in_time(receive, most)

    def keep(self, size: int) -> None:
        """Count a body that stays in memory; give the same number back, negative, at the end."""
        self.in_memory += size

    async def _in_time(self, receive: Receive, most: int) -> bytes:
        """All of it, or a refusal; `asyncio.wait_for` would cost a task a request."""
        task, late = asyncio.current_task(), False

        def expire() -> None:
            nonlocal late
            late = True
            if task is not None:
                task.cancel()

        timer = asyncio.get_running_loop().call_later(self._seconds, expire)
        try:
            return await self._all(receive, most)
        except asyncio.CancelledError:
            if not late:
                raise
            uncancel(task)
            raise Refusal(
                408, "slow_body", f"the body did not arrive within {self._seconds:.0f} s"
            ) from None
        finally:
            timer.cancel()

    async def _all(self, receive: Receive, most: int) -> bytes:
        parts: list[bytes] = []
        size, more = 0, True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal(400, "incomplete_body", "the client went away")
                part: bytes = message.get("body", b"")
                more = bool(message.get("more_body"))
                parts.append(part)
                size += len(part)
                self.in_memory += len(part)
                if size > most:
                    raise _too_big(size, most)
        finally:
            self.in_memory -= size
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_big(size: int, most: int) -> Refusal:
    return Refusal(413, "body_too_big", f"a body of {size} bytes or more, the limit is {most}")
