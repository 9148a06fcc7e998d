"""asyncio in virtual time, whose sockets lead to simulated engines.

The gateway runs its own code and aiohttp's; what is simulated begins at ``loop.sock_connect``.
"""

from __future__ import annotations

import asyncio
import socket
from asyncio import events
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from bench.simulation.scheduler import Event

if TYPE_CHECKING:
    from bench.simulation.engine import Exchange, SimulatedEngine
    from bench.simulation.world import World

__all__ = ["VirtualLoop"]

#: Seconds until a connection is made.
_CONNECT = 0.0001
#: What a coroutine awaits at its end, at most: each is one more time that it is to be closed.
_AWAITS = 5


class _Selector:
    """Where a selector waits for sockets, this waits in virtual time."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.woken = Event(world.scheduler)

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is not None and timeout <= 0 and not self.woken.flag:
            return []
        self.woken.wait(timeout)
        self.woken.clear()
        return []

    def get_map(self) -> dict[Any, Any]:
        return {}

    def close(self) -> None:
        pass


class SimulatedSocket:
    """What aiohttp has of a socket before `VirtualLoop` connects it."""

    def __init__(self, address: Any) -> None:
        pass

    def setblocking(self, flag: bool) -> None:
        pass

    def close(self) -> None:
        pass


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop of one simulated turbofit."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self._clock_resolution = 1e-9
        self._selector = _Selector(world)
        self._reached: dict[socket.socket, SimulatedEngine | None] = {}
        #: `asyncio.all_tasks` looks through those of all loops that ever were.
        self.tasks: dict[asyncio.Task[Any], None] = {}
        world.loops.append(self)

    def create_task(self, *given: Any, **named: Any) -> asyncio.Task[Any]:  # type: ignore[override]
        task = super().create_task(*given, **named)
        self.tasks[task] = None
        task.add_done_callback(self.tasks.pop)
        return task

    def time(self) -> float:
        return self._world.scheduler.now

    def _check_closed(self) -> None:
        """What a killed turbofit had under way is collected when its loop has long ended."""

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        self._selector.woken.set()

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # noqa: ARG002
        """In a thread of its own."""
        future = self.create_future()

        def settle(act: Callable[[], None]) -> None:
            self.call_soon_threadsafe(lambda: None if future.done() else act())

        def body() -> None:
            try:
                result = func(*args)
            except Exception as exc:  # noqa: BLE001 - it is raised where it is awaited
                failed = exc
                settle(lambda: future.set_exception(failed))
            else:
                settle(lambda: future.set_result(result))

        self._world.scheduler.thread(body)
        return future

    def abandon(self) -> None:
        """End what a killed turbofit had under way, before the collector does it elsewhere."""
        before = events._get_running_loop()
        events._set_running_loop(self)
        try:
            for task in list(self.tasks):
                task._log_destroy_pending = False
                for _ in range(_AWAITS):
                    with suppress(BaseException):
                        task.get_coro().close()
                        break
        finally:
            events._set_running_loop(before)

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        pass

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        """Reach what listens at a port of the simulated machine.

        Raises:
            ConnectionRefusedError: nothing does.
        """
        await asyncio.sleep(_CONNECT)
        found = self._listens_at(address[1])
        if found is None:
            raise ConnectionRefusedError(111, "Connection refused (simulated)")
        self._reached[sock] = found

    def _listens_at(self, port: int) -> Any:
        ports = self._world.machine.ports
        found: Any = ports.get(port)
        return found if found is not None and found.listening else None

    async def create_connection(  # type: ignore[override]
        self, protocol_factory: Callable[[], Any], *_: Any, sock: Any = None, **__: Any
    ) -> tuple[Any, Any]:
        engine = self._reached.pop(sock, None)
        sock.close()
        assert engine is not None
        protocol = protocol_factory()
        transport = EngineConnection(self, self._world, engine, protocol)
        protocol.connection_made(transport)
        return transport, protocol


@cache
def _head(status: int, content: str) -> bytes:
    text = f"HTTP/1.1 {status} X\r\nContent-Type: {content}\r\nTransfer-Encoding: chunked\r\n\r\n"
    return text.encode()


class EngineConnection(asyncio.Transport):
    """One connection to a simulated engine: HTTP/1.1 bytes there and back."""

    def __init__(
        self, loop: VirtualLoop, world: World, engine: SimulatedEngine, protocol: Any
    ) -> None:
        super().__init__()
        self.loop, self._world, self._engine, self._protocol = loop, world, engine, protocol
        self._received = b""
        #: Its end has come; it is on its way.
        self._closed = self._broken = False
        self._exchange: Exchange | None = None
        engine.connections.append(self)

    def get_protocol(self) -> Any:
        return self._protocol

    def set_protocol(self, protocol: Any) -> None:
        self._protocol = protocol

    def write(self, data: Any) -> None:
        if self._closed:
            return
        self._received += bytes(data)
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.decode("latin-1").split("\r\n")
        length = 0
        for line in lines[1:]:
            name, _, value = line.partition(":")
            if name.lower() == "content-length":
                length = int(value)
        if len(rest) < length:
            return
        self._received = rest[length:]
        method, path, _ = lines[0].split(" ")
        if not self._broken:
            self._exchange = self._engine.take(method, path, rest[:length], self._answer)

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def _answer(self, kind: str, value: Any) -> None:
        """Bytes of the answer, from the engine."""
        if kind == "head":
            data = _head(*value)
        elif kind == "whole":
            status, page = value
            data = _head(status, "application/json") + b"%x\r\n%s\r\n0\r\n\r\n" % (len(page), page)
            self._exchange = None
        elif kind == "lost":
            self.reset()
            return
        elif kind == "data":
            data = b"%x\r\n%s\r\n" % (len(value), value)
        else:
            data = b"0\r\n\r\n"
            self._exchange = None
        self._tell(lambda: self._protocol.data_received(data))

    def _tell(self, act: Callable[[], None]) -> None:
        if not self._closed and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(lambda: None if self._closed else act())

    def reset(self) -> None:
        """The connection breaks; an engine that still runs drops the request, as LMDeploy does."""
        if self._exchange is not None:
            self._exchange.left()
        if self._broken:
            return
        self._broken = True

        def lost() -> None:
            self._closed = True
            self._protocol.connection_lost(ConnectionResetError(104, "reset (simulated)"))

        self._tell(lost)

    def is_closing(self) -> bool:
        return self._closed

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self in self._engine.connections:
            self._engine.connections.remove(self)
        if self._exchange is not None:
            self._exchange.left()
        self.loop.call_soon(self._protocol.connection_lost, None)

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def is_reading(self) -> bool:
        return True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return False
