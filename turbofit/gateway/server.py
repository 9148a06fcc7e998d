"""Serves a gateway.

`run_gateway` serves in the main thread until a signal comes; a `GatewayThread` leaves the main
thread to the engines' supervisor.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import wait
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Generic, TypeVar, cast

from turbofit.core.errors import LaunchError, TurbofitError
from turbofit.core.process.network import EVERY_ADDRESS
from turbofit.gateway.http.uvicorn_server import (
    bind,
    keep_large_blocks,
    run_loop,
    uvicorn_server,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.gateway.http.asgi_app import AsgiApp
    from turbofit.gateway.http.protocol import LimitedProtocol

#: Seconds in which clients may read a last message, and in which aborted connections must end.
_AT_ONCE: Final = 2.0
#: Seconds in which fronts learn that a node drains; a front reads health pages twice a second.
_TOLD: Final = 2.0
#: The most seconds until a gateway's thread listens, and the most seconds from the end of its drain
#: to the end of the thread.
_START_SECONDS, _BEYOND = 30.0, 5.0

_Answer = TypeVar("_Answer")
_App = TypeVar("_App", bound="AsgiApp")


class _Serving:
    """Serves one gateway in the running event loop, and calls ``on_ready`` with its URL.

    Raises:
        LaunchError: the address cannot be bound.
        UsageError: the certificate cannot be read.
    """

    def __init__(self, gateway: AsgiApp, on_ready: Callable[[str], None]) -> None:
        keep_large_blocks()
        self._gateway = gateway
        self.ending, self._urgent = asyncio.Event(), asyncio.Event()
        self._server = uvicorn_server(gateway, lambda: on_ready(self._url))
        self._listener = bind(gateway.config)

    @property
    def _url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        host = EVERY_ADDRESS.get(host, host)
        scheme = "https" if self._gateway.config.ssl_certfile else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def end(self, *, urgent: bool) -> None:
        """Begin the drain; if ``urgent``, cut off open connections.

        Call this method in the event loop.
        """
        self.ending.set()
        if urgent:
            # Immediately: engines are killed at the same time, and clients should hear of the end
            # of the server, not of the end of an engine.
            self._cut()
            self._urgent.set()

    async def serve(self) -> None:
        """Serve until `end` is called, then drain; if cancelled, cut off open connections."""
        gateway, server = self._gateway, self._server
        serving = asyncio.ensure_future(self._live())
        ending, urgent = (asyncio.ensure_future(e.wait()) for e in (self.ending, self._urgent))
        try:
            await asyncio.wait({serving, ending}, return_when="FIRST_COMPLETED")
            gateway.connections.draining = True
            if gateway.config.front_keys:  # fronts read `draining`, and then send nothing more
                await asyncio.wait({serving, urgent}, timeout=_TOLD, return_when="FIRST_COMPLETED")
            server.should_exit = True
            drain = gateway.config.drain_seconds
            await asyncio.wait({serving, urgent}, timeout=drain, return_when="FIRST_COMPLETED")
        finally:
            ending.cancel()
            urgent.cancel()
            if not serving.done():
                await self._force_end(serving)
            self._listener.close()
        if serving.done():
            serving.result()

    async def _live(self) -> None:
        """Run the app and uvicorn's server until the server ends."""
        await self._gateway.startup()
        try:
            await self._server.serve([self._listener])
        finally:
            await self._gateway.shutdown()

    async def _force_end(self, serving: asyncio.Future[None]) -> None:
        """End the server: send a last message to each open connection, then abort them all."""
        self._cut()
        await asyncio.wait({serving}, timeout=_AT_ONCE)
        for connection in self._connections:
            connection.transport.abort()
        for task in list(self._server.server_state.tasks):
            task.cancel()
        await asyncio.wait({serving}, timeout=_AT_ONCE)

    def _cut(self) -> None:
        """Close the listener, and tell open connections that the server ends.

        A second call does nothing.
        """
        if self._gateway.connections.ending:
            return
        self._gateway.connections.ending = self._server.should_exit = True
        for listener in self._server.servers if self._server.started else ():
            listener.close()
        for connection in self._connections:
            connection.cut()

    @property
    def _connections(self) -> list[LimitedProtocol]:
        return list(cast("set[LimitedProtocol]", self._server.server_state.connections))


def run_gateway(gateway: AsgiApp, *, on_ready: Callable[[str], None] = lambda _: None) -> None:
    """Serve until a signal comes, then drain; a second signal cuts off open connections.

    `stop_signals` lists the signals. Call this function in the main thread. `_Serving` has the same
    arguments and errors.
    """
    from turbofit.core.process.signals import stop_signals, unblock

    async def main() -> None:
        serving, loop = _Serving(gateway, on_ready), asyncio.get_running_loop()
        signals = stop_signals()
        for number in signals:
            loop.add_signal_handler(number, lambda: serving.end(urgent=serving.ending.is_set()))
        unblock(signals)
        await serving.serve()

    run_loop(main())


class GatewayThread(Generic[_App]):
    """Serves a gateway in a thread of its own; a ``with`` block starts and stops the thread."""

    def __init__(self, gateway: _App) -> None:
        self._gateway = gateway
        self._listening = threading.Event()
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._serving: _Serving | None = None
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)
        self.url = ""

    def start(self) -> None:
        """Start the thread; return when the server listens, or raise the error that prevents this.

        Raises:
            LaunchError: the address cannot be bound, or the server did not start.
        """
        self._thread.start()
        if self._listening.wait(_START_SECONDS) and self._error is None:
            return
        if isinstance(self._error, TurbofitError | ModuleNotFoundError):
            raise self._error
        raise LaunchError(
            f"the gateway did not start: {self._error or 'no answer'}", hint="choose another --port"
        )

    @property
    def cut(self) -> int:
        """The number of requests that were cut off when the gateway ended."""
        return self._gateway.connections.cut

    def stop(self, *, drain: bool = True) -> None:
        """End the server: take no new requests, and wait for running requests.

        Requests that run longer than the drain's time are cut off; without ``drain``, all running
        requests are cut off at once.
        """
        if self._thread.ident is not None:
            self._end(urgent=not drain)
            self._thread.join((self._gateway.config.drain_seconds if drain else 0) + _BEYOND)

    def cut_off(self) -> None:
        """Cut off open connections. A signal handler may call this: the method takes no lock."""
        self._end(urgent=True)

    def _end(self, *, urgent: bool) -> None:
        if self._loop is not None and self._serving is not None:
            with suppress(RuntimeError):  # the loop has ended already
                self._loop.call_soon_threadsafe(partial(self._serving.end, urgent=urgent))

    def call(self, ask: Callable[[_App], _Answer], seconds: float = 10.0) -> _Answer:
        """Run ``ask(gateway)`` in the gateway's event loop; return its result or raise its error.

        If the loop is busy for ``seconds``, ``ask`` does not run later.

        Raises:
            LaunchError: the gateway does not serve, or is busy for ``seconds``.
        """

        async def answer() -> _Answer:
            await asyncio.sleep(0)  # a cancellation that waits in the loop comes first
            return ask(self._gateway)

        silent = LaunchError("the gateway does not serve", hint="start the gateway first")
        if self._loop is None or not self.alive:
            raise silent
        try:
            asked = asyncio.run_coroutine_threadsafe(answer(), self._loop)
        except RuntimeError:  # the loop was closed
            raise silent from None
        done, _ = wait((asked,), seconds)
        if not done:
            asked.cancel()
        if asked.cancelled():  # after ``seconds``, or at the end of the gateway
            raise LaunchError(
                f"the gateway did not answer within {seconds:.0f} s", hint="try again"
            )
        return asked.result()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._error is None

    def __enter__(self) -> GatewayThread[_App]:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            self._serving = _Serving(self._gateway, listens)
            await self._serving.serve()

        def listens(url: str) -> None:
            self.url = url
            self._listening.set()

        try:
            run_loop(main())
        except BaseException as exc:  # noqa: BLE001 - `start` raises the error
            self._error = exc
        finally:
            self._listening.set()
