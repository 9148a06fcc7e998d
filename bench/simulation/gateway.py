"""The gateway's thread in virtual time: the real app in a loop whose sockets are simulated."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.simulation.loop import VirtualLoop
from bench.simulation.scheduler import Event
from turbofit.core.errors import LaunchError

if TYPE_CHECKING:
    from bench.simulation.clients import Request
    from bench.simulation.engine import SimulatedEngine
    from bench.simulation.world import World
    from turbofit.gateway.http.app import Gateway

__all__ = ["SimulatedGatewayThread"]


class SimulatedGatewayThread:
    """In place of `gateway.thread.GatewayThread`: the same door, without uvicorn."""

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
        """Begin to serve."""
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
        """Take nothing new, and end."""
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
        """Run something in the gateway's loop."""
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
        """Let it look at its engines now."""
        if self._loop is not None and not self._ended.flag:
            self._loop.call_soon_threadsafe(self.gateway.monitor._poke.set)

    def serves(self, engine: SimulatedEngine) -> bool:
        """Whether it is one of its engines."""
        return engine.owner is self._process

    def open(self, request: Request) -> None:
        """A client's connection, with its request."""
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
        """turbofit ended: its clients' connections break."""
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
