"""The gateway in a thread of its own, beside a supervisor that owns the main one."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import LaunchError
from turbofit.gateway.server import run_loop, serve_gateway

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from turbofit.core.plan import Plan
    from turbofit.gateway.config import GatewayConfig
    from turbofit.gateway.server import Log

__all__ = ["GatewayThread"]

_START_SECONDS: Final = 30.0


class GatewayThread:
    """A gateway in a thread of its own, for a supervisor; a context manager.

    Arguments as for `make_gateway`.
    """

    def __init__(
        self,
        plan: Plan,
        upstreams: Sequence[str],
        config: GatewayConfig,
        *,
        overlay: bool = True,
        log: Log | None = None,
    ) -> None:
        self._arguments = (plan, tuple(upstreams), config)
        self._overlay, self._log = overlay, log
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)
        self.url = ""

    def start(self) -> None:
        """Begin to serve; returns once it listens.

        Raises:
            LaunchError: it cannot.
        """
        self._thread.start()
        if not self._ready.wait(_START_SECONDS) or self._error is not None:
            error = self._error or LaunchError(
                "the gateway did not start", hint="look for its message above"
            )
            raise error

    def stop(self) -> None:
        """Drain and end."""
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether it still serves."""
        return self._thread.is_alive() and self._error is None

    def __enter__(self) -> GatewayThread:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            run_loop(self._main())
        except BaseException as exc:  # noqa: BLE001 - it is raised again by `start`
            self._error = exc
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await serve_gateway(
            *self._arguments,
            overlay=self._overlay,
            log=self._log,
            stop=self._stop,
            on_ready=self._listens,
        )

    def _listens(self, url: str) -> None:
        self.url = url
        self._ready.set()
