"""Runs the gateway in virtual time: its own code and aiohttp's, on simulated sockets.

What is simulated begins at ``loop.sock_connect``; uvicorn and its connections are left out.
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
from turbofit.core.errors import LaunchError
from turbofit.core.messages import EXCHANGE

if TYPE_CHECKING:
    from bench.simulation.clients import Request
    from bench.simulation.engine import Exchange, SimulatedEngine
    from bench.simulation.world import World
    from turbofit.gateway.http.app import Gateway

#: Seconds until a connection is made.
_CONNECT = 0.0001
#: The most awaits in the cleanup of a coroutine: each needs one more attempt to close it.
_AWAITS = 5


class _Selector:
    """A selector that waits in virtual time, not for sockets."""

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
    """The socket that aiohttp has until `VirtualLoop` connects it."""

    def __init__(self, address: Any) -> None:
        pass

    def setblocking(self, flag: bool) -> None:
        pass

    def close(self) -> None:
        pass


class VirtualLoop(asyncio.BaseEventLoop):
    """The event loop of one simulated turbofit."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self._clock_resolution = 1e-9
        self._selector = _Selector(world)
        self._reached: dict[socket.socket, SimulatedEngine] = {}
        #: `asyncio.all_tasks` looks through the tasks of all loops, ended loops included.
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
        """Allow a closed loop, since tasks of a killed turbofit are collected after its end."""

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        self._selector.woken.set()

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # noqa: ARG002
        """Run a function in a thread of its own."""
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
        """Close the tasks of a killed turbofit before the garbage collector closes them."""
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
        """Connect to the engine that listens at a port of the simulated machine.

        Raises:
            ConnectionRefusedError: nothing listens there.
        """
        await asyncio.sleep(_CONNECT)
        engine = self._world.machine.ports.get(address[1])
        if engine is None or not engine.listening:
            raise ConnectionRefusedError(111, "Connection refused (simulated)")
        self._reached[sock] = engine

    async def create_connection(  # type: ignore[override]
        self, protocol_factory: Callable[[], Any], *_: Any, sock: Any = None, **__: Any
    ) -> tuple[Any, Any]:
        engine = self._reached.pop(sock)
        sock.close()
        protocol = protocol_factory()
        transport = EngineConnection(self, self._world, engine, protocol)
        protocol.connection_made(transport)
        return transport, protocol


@cache
def _head(status: int, content: str) -> bytes:
    text = f"HTTP/1.1 {status} X\r\nContent-Type: {content}\r\nTransfer-Encoding: chunked\r\n\r\n"
    return text.encode()


class EngineConnection(asyncio.Transport):
    """A connection to a simulated engine, in HTTP/1.1."""

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

    def write(self, data: Any) -> None:
        if self._closed:
            return
        self._received += bytes(data)
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.decode("latin-1").split("\r\n")
        parts = (line.partition(":") for line in lines[1:])
        headers = {name.lower(): value.strip() for name, _, value in parts}
        length = int(headers.get("content-length", 0))
        if len(rest) < length:
            return
        self._received = rest[length:]
        method, path, _ = lines[0].split(" ")
        if not self._broken:
            self._exchange = self._engine.take(
                method, path, rest[:length], self._answer, headers.get(EXCHANGE, "")
            )

    def _answer(self, kind: str, value: Any) -> None:
        """Pass a part of the engine's answer on as HTTP/1.1 bytes."""
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
        """Break the connection; a running engine drops the request, as LMDeploy does."""
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

    def abort(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self in self._engine.connections:
            self._engine.connections.remove(self)
        if self._exchange is not None:
            self._exchange.left()
        self.loop.call_soon(self._protocol.connection_lost, None)

    close = abort

    def get_write_buffer_size(self) -> int:
        return 0


class SimulatedGatewayThread:
    """Replaces `gateway.server.GatewayThread`, without uvicorn."""

    #: Only uvicorn's connections cut requests off.
    cut = 0

    def __init__(self, world: World, gateway: Gateway) -> None:
        self._world, self.gateway = world, gateway
        self._process = world.scheduler.process
        self._listening, self._ended = Event(world.scheduler), Event(world.scheduler)
        self._loop: VirtualLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._stop: asyncio.Event | None = None
        self._requests: dict[asyncio.Task[Any], Request] = {}
        #: Those that the loop has not begun yet.
        self._opened: list[Request] = []
        self.listens = False
        self.url = "http://127.0.0.1:23333"

    def start(self) -> None:
        """Start the gateway, and wait until it listens."""
        self._world.scheduler.thread(self._run)
        self._listening.wait(30.0)
        if self._process is self._world.primary:
            self._world.gateway = self
        assert self._process is not None
        before, self._process.gateway = self._process.gateway, self
        if before is not None and before.listens:
            self._world.violate(f"turbofit {self._process.pid} has two gateways open")
        self._process.ends.append(self._killed)

    def stop(self, *, drain: bool = True) -> None:
        """Take no new requests, and wait for the end."""
        self.listens = False
        if self._loop is None or self._stop is None or self._task is None:
            return
        if not self._ended.flag:
            self._loop.call_soon_threadsafe(self._stop.set if drain else self._task.cancel)
        seconds = (self.gateway.config.drain_seconds if drain else 0) + 5.0
        # What it keeps is written by a thread, which a slow disk holds up; nobody waits for that.
        slow_until = self._world.machine.disk_slow_until
        if not self._ended.wait(seconds) and self._world.scheduler.now > slow_until + seconds:
            self._world.violate(f"the gateway did not end within {seconds:.0f} s")

    def cut_off(self) -> None:
        if self._loop is not None and self._task is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)

    def call(self, ask: Callable[[Gateway], Any], seconds: float = 10.0) -> Any:
        """Run ``ask`` in the gateway's loop; returns its result."""
        if self._loop is None or self._ended.flag:
            raise LaunchError("the gateway does not serve", hint="start it first")
        done = Event(self._world.scheduler)
        found: list[Any] = []

        def run() -> None:
            found.append(ask(self.gateway))
            done.set()

        self._loop.call_soon_threadsafe(run)
        if not done.wait(seconds):
            raise LaunchError(f"the gateway did not answer within {seconds:.0f} s", hint="again")
        return found[0]

    @property
    def alive(self) -> bool:
        return not self._ended.flag

    def look(self) -> None:
        """Let the gateway check its engines now."""
        if self._loop is not None and not self._ended.flag:
            self._loop.call_soon_threadsafe(self.gateway.monitor.look)

    def serves(self, engine: SimulatedEngine) -> bool:
        """Return whether an engine belongs to this gateway's turbofit."""
        return engine.owner is self._process

    def open(self, request: Request) -> None:
        """Open a client's connection, which sends its request."""
        loop = self._loop
        assert loop is not None

        def begin() -> None:
            self._opened.remove(request)
            task = loop.create_task(request.run(self._world, self.gateway))
            self._requests[task] = request
            task.add_done_callback(self._over)

        self._opened.append(request)
        loop.call_soon_threadsafe(begin)

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._requests.pop(task, None)
        if not task.cancelled() and task.exception() is not None:
            self._world.violate(f"the gateway raised {task.exception()!r}")

    def _killed(self) -> None:
        """Break the connections of all clients, since turbofit ended."""
        self.listens = False
        if self._world.gateway is self:
            self._world.gateway = None
        for request in (*self._opened, *self._requests.values()):
            if not request.end:
                request.end = "lost"
                self._world.finished(request)
        self._requests.clear()

    def _run(self) -> None:
        self._loop = loop = VirtualLoop(self._world)
        loop.set_exception_handler(self._bug)
        try:
            self._task = loop.create_task(self._main())
            loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        finally:
            loop.close()
            self._ended.set()

    def _bug(self, _: Any, context: dict[str, Any]) -> None:
        self._world.violate(f"the gateway's loop: {context.get('message')} "
                            f"{context.get('exception')!r}")  # fmt: skip

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        await self.gateway.startup()
        self.listens = True
        self._listening.set()
        try:
            await self._stop.wait()
            if self._requests:
                await asyncio.wait(self._requests, timeout=self.gateway.config.drain_seconds)
        except GeneratorExit:  # turbofit was killed, and this is the collector
            return
        except asyncio.CancelledError:
            await self._end()
            raise
        await self._end()

    async def _end(self) -> None:
        self.listens, self.gateway.connections.ending = False, True
        for task in list(self._requests):
            task.cancel()
        if self._requests:
            await asyncio.wait(list(self._requests))
        await self.gateway.shutdown()
        assert self._loop is not None
        left = set(self._loop.tasks) - {asyncio.current_task()}
        if left:
            await asyncio.wait(left, timeout=1.0)
        left = {task for task in left if not task.done()}
        if left:
            self._world.violate(f"the gateway leaves tasks: {left}")
