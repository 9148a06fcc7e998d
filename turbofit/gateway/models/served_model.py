"""One model behind an address: its gateway while its engines run, and the requests that wait.

All of it belongs to the loop of the gateway in front; other threads only read numbers.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from math import ceil
from typing import TYPE_CHECKING, Any, Final, Literal

from turbofit.gateway.http.refusals import Refusal, ending

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from turbofit.gateway.http.app import Gateway

__all__ = ["ModelState", "ServedModel"]

#: ``ending``: what is under way may end, and requests wait for the next start.
ModelState = Literal["asleep", "starting", "ready", "ending", "failed"]

#: Seconds after which to try again where no start was measured yet.
_RETRY: Final = 10


class ServedModel:
    """A model that clients can name, whether its engines run or not.

    Args:
        name: its own.
        names: others that clients may call it by.
    """

    def __init__(self, name: str, names: Sequence[str] = ()) -> None:
        self.name = name
        #: All that clients may call it, beside the other models of its address.
        self.names = tuple(dict.fromkeys((name, *names)))
        self.gateway: Gateway | None = None
        self.state: ModelState = "asleep"
        #: Requests that its gateway has.
        self.in_flight = 0
        #: Requests that wait for its start, in the order in which they came; and when each came.
        self.waiting: dict[asyncio.Future[None], float] = {}
        #: When it became ready, and when its last request ended; both of time.monotonic.
        self.ready_at = self.used_at = time.monotonic()
        #: When it began to start.
        self.began_at = time.monotonic()
        #: Starts that became ready, and how long the last one took.
        self.starts = 0
        self.start_seconds: float | None = None
        #: What its next start is expected to take, where it has not been measured itself.
        self.forecast: float | None = None
        #: When the first request came that it has not answered; None where nobody wants it.
        self.wanted_since: float | None = None
        #: When somebody asked for it who did not wait, and it has not been ready since.
        self._refused_at: float | None = None
        #: Why it does not start, and until when nobody tries again.
        self.trouble, self.again_at = "", 0.0

    @property
    def idle(self) -> float:
        """Seconds since its last request ended; 0 while it has one."""
        if self.in_flight or self.waiting:
            return 0.0
        return time.monotonic() - max(self.used_at, self.ready_at)

    @property
    def rested(self) -> bool:
        """Whether it may be started, a failed start before included."""
        return self.state == "asleep" or (
            self.state == "failed" and time.monotonic() >= self.again_at
        )

    @property
    def expected(self) -> float | None:
        """Seconds that a start takes by what was measured, or by what others took."""
        return self.start_seconds if self.start_seconds is not None else self.forecast

    @property
    def retry_after(self) -> int:
        """Whole seconds after which a request is expected to find it ready."""
        if self.state == "failed":
            return max(1, ceil(self.again_at - time.monotonic()))
        expected = self.expected
        if expected is None:
            return _RETRY
        spent = time.monotonic() - self.began_at if self.state == "starting" else 0.0
        return max(1, ceil(expected - spent))

    @property
    def said(self) -> str:
        """Where it stands, for people."""
        if self.state == "failed":
            return f"{self.name} does not start: {self.trouble}"
        expected = self.expected
        known = "" if expected is None else f"; a start takes about {ceil(expected)} s"
        doing = {"asleep": "is asleep", "ending": "gives its memory back"}
        return f"{self.name} {doing.get(self.state, f'is {self.state}')}{known}"

    # Steps of whoever starts and ends its engines.

    def begin(self) -> None:
        """Its engines are about to be started."""
        self.state, self.began_at, self.trouble = "starting", time.monotonic(), ""

    def open(self, gateway: Gateway) -> None:
        """Its engines are ready behind this gateway."""
        now = time.monotonic()
        if self.state == "starting":
            self.starts, self.start_seconds = self.starts + 1, now - self.began_at
        self.gateway, self.state, self.ready_at = gateway, "ready", now
        self._refused_at = None
        self._release()

    def close(self) -> None:
        """What its gateway has may end; what comes from now on waits."""
        if self.state == "ready":
            self.state = "ending"

    def close_idle(self, seconds: float) -> bool:
        """Close it where nobody asked it for so long; whether it is closed now."""
        if self.state == "ready" and self.idle >= seconds:
            self.close()
        return self.state == "ending"

    def detach(self, gateway: Gateway) -> None:
        """Its gateway takes nothing from now on."""
        if self.gateway is gateway:
            self.gateway = None
            if self.state == "ready":
                self.begin()  # it is started again, unless somebody ends it

    def sleep(self) -> None:
        """Its engines have ended, and their memory is back."""
        self.gateway, self.state = None, "asleep"

    def fail(self, trouble: str, again_at: float) -> None:
        """It does not start: who waits is told, and nobody tries again before that time."""
        self.gateway, self.state = None, "failed"
        self.trouble, self.again_at, self._refused_at = trouble, again_at, None
        self._release(self.refusal())

    def end(self) -> None:
        """The server ends: who waits is told."""
        self._release(ending())

    # Requests.

    @contextmanager
    def request(self) -> Iterator[None]:
        """Its gateway has a request."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            self.used_at = time.monotonic()

    def refusal(self) -> Refusal:
        """What a client is told that does not wait."""
        reason = "model_unavailable" if self.state == "failed" else "model_starting"
        return Refusal(reason, why=self.said, retry_after=self.retry_after)

    async def wait(self, seconds: float, gone: asyncio.Future[Any], longest: int) -> Gateway:
        """Its gateway, once it is ready.

        Args:
            seconds: the longest wait; 0 refuses at once.
            gone: done where the client goes away.
            longest: so many requests may wait.

        Raises:
            Refusal: it does not start, or not in time, or too many wait.
            asyncio.CancelledError: the client went away.
        """
        came = time.monotonic()
        while self.state != "ready" or self.gateway is None:
            left = came + seconds - time.monotonic()
            if self.state == "failed" and not self.rested:
                raise self.refusal()
            if left <= 0:
                if not seconds:
                    self._refused_at = came if self._refused_at is None else self._refused_at
                    self._note()
                raise self.refusal()
            if len(self.waiting) >= longest:
                raise Refusal(
                    "busy:model",
                    count=len(self.waiting),
                    name=self.name,
                    retry_after=self.retry_after,
                )
            await self._turn(came, left, gone)
        return self.gateway

    async def _turn(self, came: float, seconds: float, gone: asyncio.Future[Any]) -> None:
        """Wait for one change."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting[turn] = came
        self._note()
        try:
            await asyncio.wait((turn, gone), timeout=seconds, return_when="FIRST_COMPLETED")
        finally:
            self.waiting.pop(turn, None)
            self._note()
            if not turn.done():
                turn.cancel()
        if gone.done():
            raise asyncio.CancelledError
        if turn.done() and not turn.cancelled():
            turn.result()

    def _note(self) -> None:
        """Who wants it has changed."""
        came = [*self.waiting.values(), *([] if self._refused_at is None else [self._refused_at])]
        self.wanted_since = min(came, default=None)

    def _release(self, refusal: Refusal | None = None) -> None:
        self._note()
        for turn in [one for one in self.waiting if not one.done()]:
            if refusal is None:
                turn.set_result(None)
            else:
                turn.set_exception(refusal)
