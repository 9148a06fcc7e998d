"""The gateway beside the supervisor: a thread with the public port, over all engines of a plan.

On pretend GPUs every answer says so: ``x-turbofit-pretend: 1``, and ``"pretend": true`` in
``/health``.
"""

from __future__ import annotations

import asyncio
import json
import threading
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import LaunchError, TurbofitError
from turbofit.core.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from turbofit.core.plan import Plan
    from turbofit.gateway.app import Gateway
    from turbofit.gateway.config import GatewayConfig

__all__ = ["AccessLog", "Announce", "Front", "access_log"]

_START_SECONDS: Final = 30.0
_BEYOND: Final = 5.0
_LOG_CAP: Final = 64 * MIB


class Front:
    """The public side of one plan.

    Args:
        plan: what requests are held to.
        upstreams: the engines' addresses.
        config: the gateway's settings.
        overlay: whether the engines run on the overlay's folder.
        pretend: whether the GPUs are pretend ones.
        log: takes a record of each request.
        answered: whether the engines have just answered completions, so that ``/health`` need not
            wait for the gateway's own first question.
    """

    def __init__(
        self,
        plan: Plan,
        upstreams: Sequence[str],
        config: GatewayConfig,
        *,
        overlay: bool,
        pretend: bool,
        log: Callable[[dict[str, Any]], None] | None = None,
        answered: bool = False,
    ) -> None:
        from turbofit.gateway.server import make_gateway

        self._config, self._pretend = config, pretend
        self.gateway: Gateway = make_gateway(plan, upstreams, config, overlay=overlay, log=log)
        if answered:
            for engine in self.gateway.engines:
                engine.succeeded()
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._server: Any = None
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)
        self.url = ""

    def start(self) -> None:
        """Serve; returns once it listens.

        Raises:
            LaunchError: it cannot.
            UsageError: the certificate cannot be read.
        """
        self._thread.start()
        if not self._started.wait(_START_SECONDS) or self._error is not None:
            if isinstance(self._error, TurbofitError):
                raise self._error
            raise LaunchError(
                f"the gateway did not start: {self._error or 'no answer'}",
                hint="choose another --port, or start it without a gateway: --no-gateway",
            )

    @property
    def alive(self) -> bool:
        """Whether it still serves."""
        return self._thread.is_alive()

    def stop(self, *, drain: bool) -> None:
        """Take nothing new; let what is under way end, within the drain's seconds, or not."""
        if self._server is not None:
            self._server.should_exit = True
            self._server.force_exit = not drain
        if self._thread.ident is not None:
            self._thread.join((self._config.drain_seconds if drain else 0) + _BEYOND)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as exc:  # noqa: BLE001 - `start` raises it again
            self._error = exc
        finally:
            self._started.set()

    async def _serve(self) -> None:
        from turbofit.gateway.server import bind

        listener = bind(self._config)
        try:
            app: Any = Announce(self.gateway) if self._pretend else self.gateway
            self._server = _uvicorn(app, self._config)
            serving = asyncio.ensure_future(self._server.serve([listener]))
            while not self._server.started and not serving.done():
                await asyncio.sleep(0.01)
            host, port = listener.getsockname()[:2]
            scheme = "https" if self._config.ssl_certfile else "http"
            self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
            self._started.set()
            await serving
        finally:
            listener.close()


class Announce:
    """An ASGI app around another: each answer says that the GPUs behind it are pretend ones."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun: dict[str, Any] = {}
        health = scope["path"].rstrip("/") == "/health"

        async def said(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"x-turbofit-pretend", b"1")]
                begun.update(message, headers=headers)
                if not health:
                    await send(begun)
                return
            if health:
                message = {**message, "body": _with_pretend(message.get("body", b""))}
                length = str(len(message["body"])).encode()
                begun["headers"] = [
                    (name, length if name == b"content-length" else value)
                    for name, value in begun["headers"]
                ]
                await send(begun)
            await send(message)

        await self._app(scope, receive, said)


class AccessLog:
    """JSON lines in a file that begins anew at 64 MiB; the one before it is kept as ``.1``."""

    def __init__(self, path: Path, *, cap: int = _LOG_CAP) -> None:
        self._path, self._cap = path, cap
        self._file = path.open("ab")
        self._lock = threading.Lock()

    def __call__(self, record: dict[str, Any]) -> None:
        """Keep one record; a full disk costs the log, never an answer."""
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        try:
            with self._lock:
                if self._file.tell() + len(line) > self._cap:
                    self._file.close()
                    self._path.replace(self._path.with_name(self._path.name + ".1"))
                    self._file = self._path.open("ab")
                self._file.write(line)
                self._file.flush()
        except (OSError, ValueError):
            return

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError:
            return


def access_log(where: str) -> Callable[[dict[str, Any]], None]:
    """Where records of requests go.

    Args:
        where: a file, or ``-`` for stderr.

    Raises:
        UsageError: the file cannot be written.
    """
    if where == "-":
        import sys

        from turbofit.gateway.server import log_to

        return log_to(sys.stderr)
    from pathlib import Path

    try:
        return AccessLog(Path(where))
    except OSError as exc:
        from turbofit.core.errors import UsageError

        raise UsageError(
            f"{where} cannot be written: {exc.strerror or exc}", hint="choose another --access-log"
        ) from None


def _with_pretend(body: bytes) -> bytes:
    try:
        document = json.loads(body)
    except ValueError:
        return body
    return json.dumps({**document, "pretend": True}).encode()


def _uvicorn(app: Any, config: GatewayConfig) -> Any:
    """A server without signals, logs, docs or WebSockets."""
    from contextlib import nullcontext

    import uvicorn

    from turbofit.core.errors import UsageError

    settings = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=round(config.drain_seconds),
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
    )
    try:
        settings.load()
    except OSError as exc:
        raise UsageError(
            f"the certificate cannot be read: {exc}", hint="see --ssl-certfile and --ssl-keyfile"
        ) from None
    server = uvicorn.Server(settings)
    server.capture_signals = nullcontext  # type: ignore[method-assign,assignment]
    return server
