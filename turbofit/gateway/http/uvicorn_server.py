"""Runs a gateway on uvicorn: makes the socket, the server and the event loop, and sets the heap."""

from __future__ import annotations

import ctypes
import socket
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import LaunchError, UsageError
from turbofit.core.messages import PRETEND_HEADER
from turbofit.core.process.network import open_files, tcp_socket
from turbofit.core.units import MIB
from turbofit.gateway.http.connections import BACKLOG, Acceptor

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import uvicorn

    from turbofit.gateway.config import GatewayConfig
    from turbofit.gateway.http.asgi_app import AsgiApp
    from turbofit.gateway.http.protocol import LimitedProtocol

#: Seconds after which a thread that handles a large body gives up Python's lock. Until then the
#: event loop waits, at each step of every other request. Python's default is 5 ms.
SWITCH_SECONDS: Final = 0.0005
#: The number of files that may be open in addition to the files of connections.
_OTHER_FILES: Final = 128
#: The number of connections beyond the limit of connections. They get only a refusal, so each needs
#: one open file; any other connection needs two files, one of them for its engine.
_REFUSED_FILES: Final = 128
#: The numbers of glibc's options for `mallopt`. Source: malloc.h.
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_ARENA_MAX: Final = -8
#: Bytes of free memory that stay at the heap's end.
_KEPT: Final = 64 * MIB
#: Bytes of the largest block that comes from the heap; glibc accepts at most 32 MiB.
_LARGEST: Final = 32 * MIB


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
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as exc:
        listener.close()
        raise LaunchError(
            f"{config.host}:{config.port} cannot be bound: {exc}", hint="choose another --port"
        ) from None
    return listener


def uvicorn_server(gateway: AsgiApp, on_ready: Callable[[], None]) -> uvicorn.Server:
    """Make a uvicorn server without signals, logs or WebSockets, with turbofit's own limits.

    Raises:
        UsageError: the certificate cannot be read.
    """
    import uvicorn

    from turbofit.gateway.http.protocol import LimitedProtocol

    config, limits = gateway.config, gateway.config.connection
    most = 2 * limits.connections + _REFUSED_FILES
    # The system may allow fewer files; then fewer connections are accepted.
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
        backlog=BACKLOG,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
    )
    try:
        settings.load()
    except OSError as exc:
        raise UsageError(
            f"the certificate cannot be read: {exc}", hint="check --ssl-certfile and --ssl-keyfile"
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

    Otherwise glibc returns each block to the kernel, and the next block causes page faults. A
    request with a 2 MB image took 3.6 ms, and 2 ms of these were page faults (bench/gateway).
    Threads that start after this call share one heap. Otherwise each thread would keep as much
    memory as its largest body (bench/soak).
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
    """Run a coroutine on uvloop; Python's threads switch after `SWITCH_SECONDS`."""
    import uvloop

    sys.setswitchinterval(SWITCH_SECONDS)
    uvloop.run(main, loop_factory=loop_without_lookups(uvloop.Loop))


def loop_without_lookups(base: Any) -> Any:
    """Return a subclass of uvloop's loop that connects to an address without a thread.

    `uvloop.Loop.sock_connect` looks an address up without a type of socket. For such a look-up
    uvloop needs one of libuv's four threads, and all four may wait for name servers.
    """

    class Loop(base):  # type: ignore[misc]
        async def getaddrinfo(self, host: Any, port: Any, **given: Any) -> Any:
            given["type"] = given.get("type") or socket.SOCK_STREAM
            return await super().getaddrinfo(host, port, **given)

    return Loop
