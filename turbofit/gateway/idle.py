"""An address that stays open while the engines behind it sleep or start.

A request waits here until the engines have started. Then the engines' own gateway does everything
else (limits, images, retries, suspects). An `IdleGateway` belongs to the event loop of the address.
The supervisor's thread reads the numbers of the `IdleGateway`, and changes its state only by calls
into that loop. For the supervisor, an `AttachedGateway` takes the place of a `GatewayThread`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from math import ceil
from typing import Any, Final, Literal, TypeVar

from turbofit.core.errors import LaunchError
from turbofit.core.struct import Document
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http.about import ModelFacts, facts_of
from turbofit.gateway.http.app import Gateway
from turbofit.gateway.http.asgi_app import AsgiApp, disconnected
from turbofit.gateway.http.metrics import merge
from turbofit.gateway.http.refusals import Refusal, ending
from turbofit.gateway.http.request_context import Message, Receive, RequestContext, Send
from turbofit.gateway.http.routes import Route, hold_name, named_model
from turbofit.gateway.limits.request_limits import Bounds
from turbofit.gateway.routing.health import healthy, trouble
from turbofit.gateway.server import GatewayThread

_Answer = TypeVar("_Answer")

#: In ``ending``, running requests may finish, and new requests wait for the next start.
State = Literal["asleep", "starting", "ready", "ending", "failed"]

#: Seconds that a request waits for a start: the deadline of OpenAI's clients.
_WAIT: Final = 600.0
#: Seconds after which a client should try again while the engines start.
_RETRY: Final = 10
_LOOK: Final = 0.05
#: Seconds to wait for a busy event loop; the waiting thread handles no signal during this time.
BUSY_SECONDS: Final = 60.0
#: The most seconds after the drain until the last requests have ended: their engines have ended, so
#: their answers break off.
_BROKEN_OFF: Final = 60.0


class IdleGateway(AsgiApp):
    """The app at an address that stays open while the engines sleep.

    ``config.names`` are the names of its model and adapters. ``bounds`` are the limits of the first
    plan; these limit the size of a body, and the chat page shows them while no engine runs.
    ``wait`` is the most seconds for which a request waits for the engines to start.
    """

    def __init__(self, bounds: Bounds, config: GatewayConfig, *, wait: float = _WAIT) -> None:
        super().__init__(config, bounds.limits.bytes_per_body)
        self.name = next(iter(config.names.values()))
        self._bounds, self._wait = bounds, wait
        self.gateway: Gateway | None = None
        self.state: State = "asleep"
        #: Whether the engines have been ready at least once.
        self.opened = False
        #: The number of requests at the engines' gateway, and of requests that wait for a start.
        self.in_flight = self.waiting = 0
        #: Wakes the waiting requests; each request then checks the state again.
        self._changed = asyncio.Event()
        #: Whether the server is ending.
        self._ended = False
        #: When the engines became ready or the last request ended, whichever is later, by
        #: `time.monotonic`.
        self.used_at = time.monotonic()
        #: Why the engines did not start, and the earliest time of the next start.
        self._trouble, self._again_at = "", 0.0

    @property
    def idle(self) -> float:
        """Seconds since the last request ended or the engines became ready, whichever is later.

        0 while requests run or wait.
        """
        if self.in_flight or self.waiting:
            return 0.0
        return time.monotonic() - self.used_at

    @property
    def rested(self) -> bool:
        """Whether a request may start the engines.

        True while the engines are asleep, and after the pause that follows a failed start.
        """
        return self.state == "asleep" or (
            self.state == "failed" and time.monotonic() >= self._again_at
        )

    @property
    def retry_after(self) -> int:
        """Whole seconds after which a client should try again."""
        if self.state != "failed":
            return _RETRY
        return max(1, ceil(self._again_at - time.monotonic()))

    @property
    def status(self) -> str:
        if self.state == "failed":
            return f"{self.name} does not start: {self._trouble}"
        return f"{self.name} is {self.state}"

    # The supervisor that starts and ends the engines calls the following methods.

    def begin(self) -> None:
        self.state, self._trouble = "starting", ""

    def open(self, gateway: Gateway) -> None:
        """Pass requests to ``gateway`` from now on; its engines are ready."""
        self.gateway, self.state, self.opened = gateway, "ready", True
        self.clock = gateway.clock
        self.used_at = time.monotonic()
        self._wake()

    def close_idle(self, seconds: float) -> bool:
        """Stop passing requests on if no request came for ``seconds``.

        Return whether new requests now wait.
        """
        if self.state == "ready" and self.idle >= seconds:
            self.state = "ending"
        return self.state == "ending"

    def detach(self) -> None:
        """Pass no more requests to the engines' gateway."""
        self.gateway = None
        if self.state == "ready":
            self.begin()  # without `close_idle` before, the supervisor starts other engines

    def sleep(self) -> None:
        """Note that the engines have ended and that their memory is free."""
        self.gateway, self.state = None, "asleep"

    def fail(self, trouble: str, seconds: float) -> None:
        """Note that a start failed because of ``trouble``, and refuse waiting requests.

        For ``seconds`` no request starts the engines again.
        """
        self.gateway, self.state = None, "failed"
        self._trouble, self._again_at = trouble, time.monotonic() + seconds
        self._wake()

    def end(self) -> None:
        """Refuse all waiting requests, since the server ends."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # The following methods serve requests and pages.

    async def shutdown(self) -> None:
        gateway = self.gateway
        if gateway is not None:
            self.detach()
            await gateway.shutdown()

    async def _serve(
        self, request: RequestContext, _: Route, /, receive: Receive, send: Send
    ) -> None:
        """Wait until the engines are ready, then pass the request to their gateway."""
        await self._bodies.take(request, receive)
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            hold_name(self.config.names, {"model": named_model(request.body)})
            gateway = await self._ready(gone)
            whole = iter([{"type": "http.request", "body": request.body, "more_body": False}])
            self._bodies.forget(request)  # the engines' gateway counts the body from here on

            # The gateway receives the body once more, and then waits until the client has left.
            async def replayed() -> Message:
                message = next(whole, None)
                return await asyncio.shield(gone) if message is None else message

            self.in_flight += 1
            try:
                await gateway(request.scope, replayed, send)
            finally:
                self.in_flight -= 1
                self.used_at = time.monotonic()
        finally:
            request.gone = gone.done()
            gone.cancel()
            self._bodies.forget(request)

    async def _ready(self, gone: asyncio.Future[Any]) -> Gateway:
        """Wait until the engines are ready, and return their gateway.

        ``gone`` is done when the client has left.

        Raises:
            Refusal: too many requests wait, the wait is too long, the engines cannot start, or the
                server ends.
            asyncio.CancelledError: the client has left.
        """
        ends = time.monotonic() + self._wait
        while self.state != "ready" or self.gateway is None:
            left = ends - time.monotonic()
            if self._ended:
                raise ending()
            if left <= 0 or (self.state == "failed" and not self.rested):
                reason = "model_unavailable" if self.state == "failed" else "model_starting"
                raise Refusal(reason, why=self.status, retry_after=self.retry_after)
            if self.waiting >= self.config.queue_length:
                most, again = self.config.queue_length, self.retry_after
                raise Refusal("busy:model", count=most, name=self.name, retry_after=again)
            self.waiting += 1
            change: asyncio.Future[Any] = asyncio.ensure_future(self._changed.wait())
            try:
                await asyncio.wait((change, gone), timeout=left, return_when="FIRST_COMPLETED")
            finally:
                self.waiting -= 1
                change.cancel()
            if gone.done():
                raise asyncio.CancelledError
        return self.gateway

    def _record(self, request: RequestContext) -> None:
        """Record nothing: the engines' gateway records the requests that reach it."""

    def _models(self) -> tuple[ModelFacts, ...]:
        if self.gateway is not None:
            return self.gateway._models()
        words = self.config.defaults.words
        return facts_of([self.name], self._bounds, words, self.config.memory)

    def _waits(self) -> list[str]:
        return [] if self.state == "ready" else [self.status]

    def _health(self, request: RequestContext, /) -> tuple[Document, int | None]:
        """Return the health page of the engines' gateway, or without a gateway a page of its own.

        The status of the own page is ``starting`` until the engines were ready once. Later the
        status is ``healthy``, since a request would start the engines; but for some seconds after a
        failed start (until `rested`) it is ``unavailable``. The page does not say why a start
        failed: everybody may read the page.
        """
        if self.gateway is not None:
            page, retry = self.gateway._health(request)
        else:
            fine = self.opened and (self.state != "failed" or self.rested)
            down = "unavailable" if self.opened else "starting"
            page = {"status": "healthy" if fine else down, **self.config.about}
            retry = None if fine else self.retry_after
        facts: Document = {"state": self.state, "waiting": self.waiting}
        if self.gateway is not None and not healthy(self.gateway.engines):
            facts.update(trouble(self.gateway.fleet.outage, "state"))
        return {**page, **facts, "draining": self.connections.draining}, retry

    async def metrics_text(self) -> str:
        """Return the metrics of this address and of the engines' gateway, labelled by model."""
        samples = (
            ("ready", "Whether the engines are ready.", self.state == "ready"),
            ("waiting", "Requests that wait for a start.", self.waiting),
            ("in_flight", "Requests at the engines' gateway.", self.in_flight),
        )
        ours = "".join(
            f"# HELP turbofit_model_{name} {explained}\n# TYPE turbofit_model_{name} gauge\n"
            f"turbofit_model_{name} {value:g}\n"
            for name, explained, value in samples
        )
        page = "" if self.gateway is None else await self.gateway.metrics_text()
        # The page with the empty label has the counters of this address, which also refuses
        # requests. Prometheus reads an empty label as no label.
        return merge({self.name: page + ours, "": self.metrics.text({})}, "model")


class AttachedGateway:
    """The engines' gateway behind an `IdleGateway`, from the engines' start to their end."""

    def __init__(
        self, address: GatewayThread[IdleGateway], app: IdleGateway, gateway: Gateway
    ) -> None:
        self._address, self._app, self._gateway = address, app, gateway
        #: The start or the end of the gateway; the event loop itself keeps no reference to a task.
        self._task: asyncio.Task[Any] | None = None

    def start(self) -> None:
        """Pass requests to this gateway from now on."""

        def begin(app: IdleGateway) -> None:
            self._task = asyncio.ensure_future(self._gateway.startup())
            app.open(self._gateway)

        self._address.call(begin, BUSY_SECONDS)

    @property
    def url(self) -> str:
        return self._address.url

    def call(self, ask: Callable[[Gateway], _Answer]) -> _Answer:
        return self._address.call(lambda _: ask(self._gateway))

    @property
    def cut(self) -> int:
        """The number of requests that were cut off when the address ended."""
        return self._address.cut

    def cut_off(self) -> None:
        self._address.cut_off()

    def stop(self, *, drain: bool = True) -> None:
        """Send the gateway no more requests, and close it; ``drain``: wait for running requests."""

        def detach(app: IdleGateway) -> None:
            if app.gateway is self._gateway:
                app.detach()
                self._task = asyncio.ensure_future(self._close())

        with suppress(LaunchError):  # the address has closed, and has ended the gateway
            self._address.call(detach, BUSY_SECONDS)
            deadline = time.monotonic() + (self._gateway.config.drain_seconds if drain else 0)
            while self._app.in_flight and time.monotonic() < deadline:
                time.sleep(_LOOK)

    async def _close(self) -> None:
        """Close the gateway when its requests have ended, at the latest after the drain's time."""
        deadline = time.monotonic() + self._gateway.config.drain_seconds + _BROKEN_OFF
        while self._app.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK)
        await self._gateway.shutdown()
