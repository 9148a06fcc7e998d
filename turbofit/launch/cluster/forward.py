"""Lets other machines reach an engine: a port of the node that only gateways may use.

LMDeploy listens on loopback, where none but this node reaches it. Connections from the gateways'
addresses are passed on byte by byte, both ways and no faster than the slower end takes them; all
others are closed at once, and counted. While the engine does not listen, a request is answered here
that it never got there, which a gateway tells from an engine that died of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Final, cast

from turbofit.core.errors import LaunchError
from turbofit.gateway.http.refusals import UNREACHED

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable

__all__ = ["Forwarder"]

_START_SECONDS: Final = 10.0
_END_SECONDS: Final = 5.0
#: Bytes that may wait for the slower end.
_WAITING: Final = 1 << 20
_NEVER_SENT: Final = (
    "HTTP/1.1 503 Service Unavailable\r\n"
    f"{UNREACHED}: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
).encode()


class Forwarder:
    """Passes connections on to a port of loopback, from a thread of its own.

    Args:
        host: the address to listen at.
        target: the engine's port on loopback.
        peers: the addresses that may connect.
        tls: the certificate to show, and what clients must show; None is plain TCP.
        on_refused: called when an address is turned away for the first time.
    """

    def __init__(
        self,
        host: str,
        target: int,
        peers: Iterable[str],
        tls: ssl.SSLContext | None = None,
        on_refused: Callable[[], None] = lambda: None,
    ) -> None:
        self._host, self.target, self._tls, self._on_refused = host, target, tls, on_refused
        self._peers = frozenset(peers)
        self.port = 0
        #: Addresses that were turned away, and how often.
        self.refused: dict[str, int] = {}
        self._open: set[_Side] = set()
        self._error: OSError | None = None
        self._listening = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="forward", daemon=True)

    @property
    def url(self) -> str:
        """Where gateways reach the engine."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}"

    def start(self) -> None:
        """Begin; returns once it listens.

        Raises:
            LaunchError: it cannot.
        """
        self._thread.start()
        if not self._listening.wait(_START_SECONDS) or self._error is not None:
            raise LaunchError(
                f"{self._host} cannot be listened at: {self._error or 'no answer'}",
                hint="start Ray with --node-ip-address, an address of this node that others reach",
            )

    def allow(self, peers: Iterable[str]) -> None:
        """From now on these may connect."""
        self._peers = frozenset(peers)

    def stop(self) -> None:
        """Close the port and what goes through it."""
        loop, ended = self._loop, self._ended
        if loop is not None and ended is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(ended.set)
        if self._thread.ident is not None:
            self._thread.join(_END_SECONDS)

    def admits(self, address: str) -> bool:
        """Whether a connection from there is passed on; one that is not is noted."""
        if address in self._peers:
            return True
        self.refused[address] = self.refused.get(address, 0) + 1
        if self.refused[address] == 1:
            self._on_refused()
        return False

    def _run(self) -> None:
        from importlib import import_module
        from importlib.util import find_spec

        run = import_module("uvloop").run if find_spec("uvloop") else asyncio.run
        try:
            run(self._serve())
        except OSError as exc:
            self._error = exc
        finally:
            self._listening.set()

    async def _serve(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        server = await self._loop.create_server(
            lambda: _Front(self, self._open), self._host, 0, ssl=self._tls
        )
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        await self._ended.wait()
        server.close()
        for side in tuple(self._open):
            side.abort()


class _Side(asyncio.Protocol):
    """One end of a connection: what comes in goes out at the other."""

    def __init__(self, ends: set[_Side]) -> None:
        self._ends = ends
        self.transport: asyncio.Transport | None = None
        self.other: _Side | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=_WAITING)
        self._ends.add(self)

    def data_received(self, data: bytes) -> None:
        other = None if self.other is None else self.other.transport
        if other is not None:
            other.write(data)

    def eof_received(self) -> bool:
        other = None if self.other is None else self.other.transport
        if other is None or other.is_closing() or not other.can_write_eof():
            return False
        other.write_eof()
        return True

    def pause_writing(self) -> None:
        other = None if self.other is None else self.other.transport
        if other is not None:
            other.pause_reading()

    def resume_writing(self) -> None:
        other = None if self.other is None else self.other.transport
        if other is not None and not other.is_closing():
            other.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        self._ends.discard(self)
        other = None if self.other is None else self.other.transport
        if other is not None and not other.is_closing():
            other.close()

    def abort(self) -> None:
        """Break it off."""
        if self.transport is not None:
            self.transport.abort()


class _Front(_Side):
    """The gateway's end."""

    def __init__(self, forwarder: Forwarder, ends: set[_Side]) -> None:
        super().__init__(ends)
        self._forwarder = forwarder
        self._connecting: asyncio.Task[None] | None = None
        #: What came before the engine's end was there, and whether that was all.
        self._early, self._ended = bytearray(), False
        #: There is no engine's end.
        self._refused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        peer = transport.get_extra_info("peername")
        if not peer or not self._forwarder.admits(peer[0]):
            self.transport.abort()
            return
        self._connecting = asyncio.ensure_future(self._connect())

    def data_received(self, data: bytes) -> None:
        # A connection to loopback is made at once: what comes before is one read or two.
        if self._refused:
            return
        if self.other is None:
            self._early += data
        else:
            super().data_received(data)

    def eof_received(self) -> bool:
        if self.other is None:
            self._ended = True
            return not self._refused
        return super().eof_received()

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, back = await loop.create_connection(
                lambda: _Back(self), "127.0.0.1", self._forwarder.target
            )
        except OSError:
            self._refuse()
            return
        if self.transport is None or self.transport.is_closing():
            back.abort()
            return
        self.other = back
        super().data_received(bytes(self._early))
        self._early.clear()
        if self._ended:
            super().eof_received()

    def _refuse(self) -> None:
        """Answer that nothing listens.

        What still comes of the request is thrown away, and the gateway closes: if this side closed,
        the reset could arrive before the answer.
        """
        self._refused = True
        self._early.clear()
        if self.transport is None or self.transport.is_closing():
            return
        self.transport.write(_NEVER_SENT)
        if self._ended:
            self.transport.close()


class _Back(_Side):
    """The engine's end."""

    def __init__(self, front: _Front) -> None:
        super().__init__(front._ends)
        self.other = front
