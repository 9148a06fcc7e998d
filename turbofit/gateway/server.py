"""Makes the gateway of a plan, and serves it.

`run_gateway` serves in the main thread until a signal comes; a `GatewayThread` leaves the main
thread to the engines' supervisor.
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
import sys
import threading
from concurrent.futures import Future, wait
from contextlib import nullcontext, suppress
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

import msgspec

from turbofit.core.errors import LaunchError, PackageError, TurbofitError, UsageError
from turbofit.core.installation import install_command
from turbofit.core.messages import PRETEND_HEADER
from turbofit.core.process.network import EVERY_ADDRESS, open_files, tcp_socket
from turbofit.core.units import MIB
from turbofit.gateway.http.connections import Acceptor, is_loopback
from turbofit.gateway.http.routes import memory_bars
from turbofit.gateway.limits.request_limits import bounds_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    import uvicorn

    from turbofit.core.plan import Plan
    from turbofit.core.struct import Document
    from turbofit.gateway.config import GatewayConfig
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.http.asgi_app import AsgiApp
    from turbofit.gateway.http.metrics import Log
    from turbofit.gateway.http.protocol import LimitedProtocol
    from turbofit.gateway.routing.deny_list import DenyList

_BACKLOG: Final = 2048
#: Seconds for which a thread that handles a large body keeps Python's lock: at each step of every
#: other request, the event loop waits for this time. Python's default is 5 ms.
SWITCH_SECONDS: Final = 0.0005
#: Open files beside those of connections (two each: the client's and the engine's); and open files
#: for connections that are only told that there are too many.
_OTHER_FILES: Final = 128
_REFUSED_FILES: Final = 128
#: Seconds for clients to read a last message, and again for aborted connections to end.
_AT_ONCE: Final = 2.0
#: Seconds in which fronts learn that a node drains; they read its health page twice a second.
_TOLD: Final = 2.0
#: Seconds until a gateway's thread must listen, and seconds beyond its drain until it has ended.
_START_SECONDS, _BEYOND = 30.0, 5.0
#: glibc's names for `mallopt`. Source: malloc.h.
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_ARENA_MAX: Final = -8
#: Bytes of free memory that stay at the heap's end, and of the largest block from the heap; glibc
#: accepts at most 32 MiB for the latter.
_KEPT: Final = 64 * MIB
_LARGEST: Final = 32 * MIB

_Answer = TypeVar("_Answer")
_App = TypeVar("_App", bound="AsgiApp")


def check_bind(config: GatewayConfig, *, no_auth: bool = False) -> None:
    """Refuse an address beyond the loopback if no key is set and ``no_auth`` is not given.

    Raises:
        UsageError: others could reach the engines without a key.
    """
    if config.api_keys or config.front_keys or no_auth or is_loopback(config.host):
        return
    raise UsageError(
        f"--host {config.host} is reachable from other machines and no key is set",
        hint="give --api-key, or --no-auth if everybody may use the server",
    )


def make_gateway(
    plan: Plan,
    upstreams: Sequence[str],
    config: GatewayConfig,
    *,
    overlay: bool = True,
    log: Log | None = None,
    deny_list: DenyList | None = None,
) -> Gateway:
    """Make the gateway of a plan, which is an ASGI app.

    ``upstreams`` are the engines' URLs in the order of the plan's groups. ``overlay``: the engines
    run on the folder that `gateway.overlay` makes. ``deny_list`` is the deny list of the previous
    gateway; None makes a new list.

    Raises:
        PackageError: aiohttp or Pillow is missing.
        UsageError: there is no engine, or a text is no URL.
    """
    _need("aiohttp", "PIL")
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.upstream import refuse_no_url

    refuse_no_url(upstreams or [""], "an engine", "http://127.0.0.1:23334")

    bounds = bounds_of(plan, overlay=overlay)
    config = msgspec.structs.replace(config, about=about_plan(plan), memory=memory_bars(plan))
    return Gateway(bounds, upstreams, config, log, deny_list=deny_list)


def about_plan(plan: Plan) -> Document:
    """Return what `/health` tells a front about a plan: its capacity, limits and digest."""
    limits = plan.promise.limits
    return {
        "at_once": plan.requests_at_once,
        "kv_tokens": plan.kv_tokens,
        "context": plan.promise.context,
        "images": limits.images_per_request if limits.vision_unit is not None else 0,
        "image_limit": limits.image_limit,
        "bytes_per_body": limits.bytes_per_body,
        "plan": digest_of(plan),
    }


def digest_of(plan: Plan) -> str:
    """Return a hash of a plan's settings and limits, by which two plans can be compared."""
    engines = [(it.gpus, it.settings, it.units_per_forward) for it in plan.engines]
    promise = (plan.promise.limits, plan.promise.context)
    parts = (plan.model.name, plan.backend, engines, promise)
    return sha256(msgspec.json.encode(parts)).hexdigest()[:16]


class _Serving:
    """Serves one gateway in the running event loop; ``on_ready`` is called with the gateway's URL.

    Raises:
        LaunchError: the address cannot be bound.
        UsageError: the certificate cannot be read.
    """

    def __init__(self, gateway: AsgiApp, on_ready: Callable[[str], None]) -> None:
        keep_large_blocks()
        self._gateway = gateway
        self.ending, self._urgent = asyncio.Event(), asyncio.Event()
        self._listener = bind(gateway.config)
        host, port = self._listener.getsockname()[:2]
        host = EVERY_ADDRESS.get(host, host)
        scheme = "https" if gateway.config.ssl_certfile else "http"
        url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
        try:
            self._server = _uvicorn(gateway, partial(on_ready, url))
        except BaseException:
            self._listener.close()
            raise

    def end(self, *, urgent: bool) -> None:
        """Begin the drain; if ``urgent``, cut off open connections. Call it in the event loop."""
        self.ending.set()
        if urgent:
            # Immediately, because engines are killed meanwhile, and the loop may see that first.
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
            if gateway.config.front_keys:  # fronts read it, and send nothing more
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

    `stop_signals` lists the signals. Call this function in the main thread. Arguments and errors
    are the same as for `_Serving`.
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
        if isinstance(self._error, TurbofitError):
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
        """Cut off open connections; safe in a signal handler, since no lock is taken."""
        self._end(urgent=True)

    def _end(self, *, urgent: bool) -> None:
        if self._loop is not None and self._serving is not None:
            with suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(partial(self._serving.end, urgent=urgent))

    def call(self, ask: Callable[[_App], _Answer], seconds: float = 10.0) -> _Answer:
        """Run ``ask(gateway)`` in the gateway's event loop; return its result or raise its error.

        Raises:
            LaunchError: the gateway does not serve, or is busy for ``seconds``.
        """
        answer: Future[_Answer] = Future()

        def run() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(ask(self._gateway))
            except BaseException as exc:  # noqa: BLE001 - the caller raises it
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
        except BaseException as exc:  # noqa: BLE001 - it is raised again by `start`
            self._error = exc
        finally:
            self._listening.set()


def bind(config: GatewayConfig) -> socket.socket:
    """Open the listening socket; port 0 chooses a free port.

    Raises:
        LaunchError: the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = tcp_socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as exc:
        listener.close()
        raise LaunchError(
            f"{config.host}:{config.port} cannot be bound: {exc}", hint="choose another --port"
        ) from None
    return listener


def _uvicorn(gateway: AsgiApp, on_ready: Callable[[], None]) -> uvicorn.Server:
    """Make a uvicorn server without signals, logs or WebSockets, with turbofit's own limits.

    Raises:
        UsageError: the certificate cannot be read.
    """
    _need("uvicorn", "httptools")
    import uvicorn

    from turbofit.gateway.http.protocol import LimitedProtocol

    config, limits = gateway.config, gateway.config.connection
    most = 2 * limits.connections + _REFUSED_FILES
    files = open_files(_OTHER_FILES + most)
    most = min(most, files - min(_OTHER_FILES, files // 2))
    gateway.connections.lower(most // 2)
    settings = uvicorn.Config(
        gateway,
        log_config=None,
        access_log=False,
        server_header=False,
        http=LimitedProtocol,
        headers=[(PRETEND_HEADER, "1")] if config.pretend else [],
        proxy_headers=bool(config.trusted_proxies),
        forwarded_allow_ips=list(config.trusted_proxies),
        ws="none",
        lifespan="off",
        timeout_keep_alive=limits.keep_alive_seconds,
        backlog=_BACKLOG,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
    )
    try:
        settings.load()
    except OSError as exc:
        raise UsageError(
            f"the certificate cannot be read: {exc}", hint="see --ssl-certfile and --ssl-keyfile"
        ) from None

    class GatewayServer(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup([])

            def protocol() -> LimitedProtocol:
                return LimitedProtocol(
                    limits, gateway.connections, config=self.config,
                    server_state=self.server_state, app_state=self.lifespan.state,
                )  # fmt: skip

            self.servers = [
                Acceptor(listener, gateway.connections, most, protocol, self.config.ssl)  # type: ignore[misc]
                for listener in sockets or ()
            ]
            on_ready()

        def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
            """Leave signals to the caller that runs the gateway."""
            return nullcontext()

    return GatewayServer(settings)


def keep_large_blocks() -> bool:
    """Let glibc take large blocks from the heap and keep them; return whether this is possible.

    Otherwise glibc returns each block to the kernel and faults its pages in again for the next
    block: this was 2 ms of the 3.6 ms in which a 2 MB image was read, held and written
    (bench/gateway). Threads that start afterwards share one heap: otherwise each thread would keep
    as much as the largest body that it ever had, and 16 MiB more for each other thread with such a
    body (bench/soak).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library without a name
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return bool(
        mallopt(_TRIM_THRESHOLD, _KEPT)
        and mallopt(_MMAP_THRESHOLD, _LARGEST)
        and mallopt(_ARENA_MAX, 1)
    )


def run_loop(main: Any) -> None:
    """Run a coroutine on uvloop if it is installed, else on asyncio.

    Python's threads switch after `SWITCH_SECONDS`.
    """
    from importlib import import_module
    from importlib.util import find_spec

    sys.setswitchinterval(SWITCH_SECONDS)
    if find_spec("uvloop"):
        uvloop = import_module("uvloop")
        uvloop.run(main, loop_factory=loop_without_lookups(uvloop.Loop))
    else:
        asyncio.run(main)


def loop_without_lookups(base: Any) -> Any:
    """Return a class of loops, made of uvloop's, that connects to an address without a thread.

    `uvloop.Loop.sock_connect` names no type of socket when it looks an address up. So uvloop waits
    for one of libuv's four threads, which all may wait for names.
    """

    class Loop(base):  # type: ignore[misc]
        async def getaddrinfo(self, host: Any, port: Any, **given: Any) -> Any:
            given["type"] = given.get("type") or socket.SOCK_STREAM
            return await super().getaddrinfo(host, port, **given)

    return Loop


def _need(*packages: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise PackageError(
            f"the gateway needs {', '.join(missing)}",
            hint=f"install it with {install_command('gateway')}",
        )
