"""One model behind an address: its gateway while its engines run, and the requests that wait.

A `ServedModel` belongs to the loop of the address; other threads only read numbers. A supervisor
has an `AttachedGateway`, which is what `GatewayThread` is to a model alone.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager, suppress
from math import ceil
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from turbofit.core.errors import LaunchError
from turbofit.gateway.http.refusals import Refusal, ending

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.http.asgi_app import AsgiApp
    from turbofit.gateway.thread import GatewayThread

__all__ = ["AttachedGateway", "ModelState", "ServedModel", "insist"]

_Answer = TypeVar("_Answer")
_App = TypeVar("_App", bound="AsgiApp")

#: ``ending``: what is under way may end, and requests wait for the next start.
ModelState = Literal["asleep", "starting", "ready", "ending", "failed"]

#: Seconds after which to try again where no start was measured yet.
_RETRY: Final = 10
_LOOK: Final = 0.05
#: Seconds for which a loop may be busy: a server that waits hears no signal.
_BUSY_SECONDS: Final = 60.0
#: Seconds for requests of engines that are gone: each ends as soon as its connection breaks.
_BROKEN_OFF: Final = 60.0


class ServedModel:
    """A model that clients can name, by its own name and others, whether its engines run or not."""

    def __init__(self, name: str, names: Sequence[str] = ()) -> None:
        self.name = name
        #: All that clients may call it, beside the other models of its address.
        self.names = tuple(dict.fromkeys((name, *names)))
        self.gateway: Gateway | None = None
        self.state: ModelState = "asleep"
        #: Requests that its gateway has.
        self.in_flight = 0
        #: Requests that wait for its start, in the order in which they came; and when each came.
        self.waiting: dict[asyncio.Future[Any], float] = {}
        #: Wakes them; each looks whether it waits on.
        self._changed = asyncio.Event()
        #: Whether the server ends.
        self._ended = False
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
    def status(self) -> str:
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
        self._wake()

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
        self._wake()

    def end(self) -> None:
        """The server ends: who waits is told."""
        self._ended = True
        self._wake()

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
        return Refusal(reason, why=self.status, retry_after=self.retry_after)

    async def wait(self, seconds: float, gone: asyncio.Future[Any], longest: int) -> Gateway:
        """Its gateway, once it is ready, within so many seconds; 0 refuses at once.

        ``gone`` is done where the client goes away; so many requests as ``longest`` may wait.

        Raises:
            Refusal: it does not start, or not in time, or too many wait.
            asyncio.CancelledError: the client went away.
        """
        came = time.monotonic()
        while self.state != "ready" or self.gateway is None:
            left = came + seconds - time.monotonic()
            if self._ended:
                raise ending()
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
            change: asyncio.Future[Any] = asyncio.ensure_future(self._changed.wait())
            self.waiting[change] = came
            self._note()
            try:
                await asyncio.wait((change, gone), timeout=left, return_when="FIRST_COMPLETED")
            finally:
                del self.waiting[change]
                self._note()
                change.cancel()
            if gone.done():
                raise asyncio.CancelledError
        return self.gateway

    def _note(self) -> None:
        """Who wants it has changed."""
        came = [*self.waiting.values(), *([] if self._refused_at is None else [self._refused_at])]
        self.wanted_since = min(came, default=None)

    def _wake(self) -> None:
        self._note()
        self._changed.set()
        self._changed = asyncio.Event()


def insist(address: GatewayThread[_App], ask: Callable[[_App], _Answer]) -> _Answer:
    """Run something in the address's loop, which may be busy for a minute.

    Raises:
        LaunchError: the address is not served any more, or its loop hangs.
    """
    return address.call(ask, _BUSY_SECONDS)


class AttachedGateway:
    """A model's gateway behind the address of all, from its engines' start to their end."""

    def __init__(self, address: GatewayThread[Any], model: ServedModel, gateway: Gateway) -> None:
        self._address, self._model, self._gateway = address, model, gateway
        self._task: asyncio.Task[Any] | None = None

    def start(self) -> None:
        """Requests for the model go to its gateway from now on.

        Raises:
            LaunchError: the address is not served any more.
        """

        def begin(_: object) -> None:
            self._task = asyncio.ensure_future(self._gateway.startup())
            self._model.open(self._gateway)

        insist(self._address, begin)

    @property
    def url(self) -> str:
        """The address of all models."""
        return self._address.url

    def call(self, ask: Callable[[Gateway], _Answer]) -> _Answer:
        """Run ``ask(gateway)`` in the loop, and return what it returns.

        Raises:
            LaunchError: the address is not served any more, or its loop is too busy.
        """
        return self._address.call(lambda _: ask(self._gateway))

    @property
    def cut(self) -> int:
        """How many requests of all models the address's end has cut off."""
        return self._address.cut

    def cut_off(self) -> None:
        """Cut off what the address of all models has under way."""
        self._address.cut_off()

    def stop(self, *, drain: bool = True) -> None:
        """Give it no request any more, and close it.

        Args:
            drain: wait until what it has has ended, within the drain's seconds.
        """

        def detach(_: object) -> None:
            if self._model.gateway is self._gateway:
                self._model.detach(self._gateway)
                self._task = asyncio.ensure_future(self._close())

        with suppress(LaunchError):  # the address is closed, and its gateways with it
            insist(self._address, detach)
            deadline = time.monotonic() + (self._gateway.config.drain_seconds if drain else 0)
            while self._model.in_flight and time.monotonic() < deadline:
                time.sleep(_LOOK)

    async def _close(self) -> None:
        """Close it once what it has has ended, which its engines' end sees to."""
        deadline = time.monotonic() + self._gateway.config.drain_seconds + _BROKEN_OFF
        while self._model.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK)
        await self._gateway.shutdown()
