"""The gateway in a thread of its own, beside a supervisor that owns the main one."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from turbofit.core.errors import LaunchError, TurbofitError
from turbofit.gateway.server import Ends, run_loop, serve_gateway

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.gateway.http.asgi_app import AsgiApp

__all__ = ["GatewayThread"]

_START_SECONDS: Final = 30.0
_BEYOND: Final = 5.0

_Answer = TypeVar("_Answer")
_App = TypeVar("_App", bound="AsgiApp")


class GatewayThread(Generic[_App]):
    """Serves a gateway from a thread of its own; a context manager.

    Args:
        gateway: see `make_gateway`; or one of several models.
    """

    def __init__(self, gateway: _App) -> None:
        self._gateway = gateway
        self._listening = threading.Event()
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ends: Ends | None = None
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)
        self.url = ""

    def start(self) -> None:
        """Begin to serve; returns once it listens.

        Raises:
            LaunchError: it cannot.
            UsageError: the certificate cannot be read.
        """
        self._thread.start()
        if self._listening.wait(_START_SECONDS) and self._error is None:
            return
        if isinstance(self._error, TurbofitError):
            raise self._error
        raise LaunchError(
            f"the gateway did not start: {self._error or 'no answer'}", hint="choose another --port"
        )

    @property
    def cut(self) -> int:
        """How many requests its end has cut off."""
        return self._gateway.connections.cut

    def stop(self, *, drain: bool = True) -> None:
        """Take nothing new, and end.

        Args:
            drain: let what is under way end, within the drain's seconds; False cuts it off.
        """
        if self._thread.ident is not None:
            self._end(urgent=not drain)
            self._thread.join((self._gateway.config.drain_seconds if drain else 0) + _BEYOND)

    def cut_off(self) -> None:
        """Cut off what is open; safe in a signal handler, since it takes no lock."""
        self._end(urgent=True)

    def _end(self, *, urgent: bool) -> None:
        if self._loop is not None and self._ends is not None:
            with suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(partial(self._ends.tell, urgent=urgent))

    def call(self, ask: Callable[[_App], _Answer], seconds: float = 10.0) -> _Answer:
        """Run ``ask(gateway)`` in the gateway's loop, and return what it returns.

        Args:
            ask: e.g. ``lambda gateway: gateway.rest(None)``; what it raises is raised here.
            seconds: how long to wait for it.

        Raises:
            LaunchError: the gateway does not serve, or is too busy.
        """
        answer: Future[_Answer] = Future()

        def run() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(ask(self._gateway))
            except BaseException as exc:  # noqa: BLE001 - it is raised where it was asked
                answer.set_exception(exc)

        silent = LaunchError("the gateway does not serve", hint="start it first")
        if self._loop is None or not self.alive:
            raise silent
        try:
            self._loop.call_soon_threadsafe(run)
        except RuntimeError:  # the loop was closed
            raise silent from None
        done, _ = wait((answer,), seconds)
        if not done and answer.cancel():
            raise LaunchError(
                f"the gateway did not answer within {seconds:.0f} s", hint="try again"
            )
        return answer.result()

    @property
    def alive(self) -> bool:
        """Whether it still serves."""
        return self._thread.is_alive() and self._error is None

    def __enter__(self) -> GatewayThread[_App]:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        async def main() -> None:
            self._ends, self._loop = Ends(), asyncio.get_running_loop()
            await serve_gateway(self._gateway, ends=self._ends, on_ready=listens)

        def listens(url: str) -> None:
            self.url = url
            self._listening.set()

        try:
            run_loop(main())
        except BaseException as exc:  # noqa: BLE001 - it is raised again by `start`
            self._error = exc
        finally:
            self._listening.set()
