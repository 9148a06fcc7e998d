"""Gateways of a simulated cluster, and the coordinator that tells them where to send requests.

The coordinator is turbofit's own, in an actor whose process may die. A gateway's requests are only
counted; it follows routing tables as the real one does, at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from turbofit.launch.cluster.coordinator import Coordinator
from turbofit.launch.cluster.extra_gateway import _Attending

from bench.simulation.ray import Handle, Method, Ref
from bench.simulation.scheduler import Event, Process
from turbofit.core.errors import TurbofitError
from turbofit.gateway.config import GatewayConfig
from turbofit.launch.cluster.ray_adapter import ActorDiedError, ActorRestartsError

if TYPE_CHECKING:
    from bench.simulation.cluster_world import ClusterWorld
    from turbofit.gateway.routing.routing_table import RoutingTable

__all__ = [
    "CoordinatorActor",
    "ExtraGateway",
    "FleetGateway",
    "FleetGatewayThread",
    "SimulatedCondition",
]

#: Seconds of a call to the coordinator, at most.
_CALL = 0.1
#: Between two looks of a gateway: 0.2 s in use.
_TICK = 2.0


class SimulatedCondition(Event):
    """``threading.Condition``; threads change only where they wait, so that nothing is locked."""

    notify_all = Event.poke

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class CoordinatorActor(Handle):
    """The coordinator, which Ray starts again where its process dies."""

    def __init__(self, world: ClusterWorld) -> None:
        super().__init__(world.ray)
        self._world, self._alive = world, True
        self._process: Process | None = None
        for name in ("write", "answer", "ask", "poll", "leave"):
            setattr(self, name, self._method(name, lambda: 0.0))
        self._begin()

    def handle(self, late: Callable[[], float]) -> Any:
        """That of a gateway, whose calls begin so many seconds late."""
        return SimpleNamespace(poll=self._method("poll", late), leave=self._method("leave", late))

    def end_process(self) -> None:
        """Its process dies, and what it knew is forgotten."""
        if self._process is not None:
            self._end(ActorRestartsError("its process died (simulated)"))
            self._world.scheduler.after(self._world.rng.uniform(1.0, 5.0), self._begin)

    def die(self) -> None:
        """It is gone for good."""
        self._alive = False
        self._end(ActorDiedError("it is gone (simulated)"))

    def _begin(self) -> None:
        if self._alive:
            self._process = Process(self._world.new_pid())
            self._coordinator = Coordinator(lambda: self._world.scheduler.now)

    def _end(self, error: Exception) -> None:
        if self._process is not None:
            self._world.scheduler.end(self._process)
        self._process = None
        self._fail(error)

    def _method(self, name: str, late: Callable[[], float]) -> Method:
        return Method(partial(self._call, name, late))

    def _call(self, name: str, late: Callable[[], float], *given: Any) -> Ref:
        ref, scheduler = Ref(self._ray, awaited=False), self._world.scheduler
        seconds = late() + self._world.rng.uniform(0.0, _CALL)
        scheduler.after(seconds, lambda: self._reach(ref, name, given))
        return ref

    def _reach(self, ref: Ref, name: str, given: tuple[Any, ...]) -> None:
        """A call is there: its process runs it, or there is none."""
        if self._process is None:
            gone = ActorRestartsError if self._alive else ActorDiedError
            ref.fail(gone("there is no process (simulated)"))
            return
        self._keep(ref)
        method = getattr(self._coordinator, name)
        self._world.scheduler.thread(lambda: ref.give(method(*given)), self._process)


class FleetGateway:
    """In place of `gateway.http.app.Gateway`: knows where to send, and counts what it has there."""

    def __init__(self, world: ClusterWorld, routing_table: RoutingTable) -> None:
        self._world, self._busy = world, dict[str, int]()
        self.routing_table = routing_table
        self.follow(routing_table)

    def follow(self, routing_table: RoutingTable) -> None:
        """New engines get requests; those that are drained end what they have after a while."""
        world, before, self._busy = self._world, self._busy, {}
        self.routing_table = routing_table
        for member in routing_table.members:
            name = member.name
            if member.draining:
                self._busy[name] = before.get(name, 0)
                world.scheduler.after(world.rng.uniform(0.0, 120.0), partial(self._idle, name))
            else:
                self._busy[name] = before.get(name, world.rng.randrange(3))

    def sends_to(self, name: str, url: str | None = None) -> bool:
        """Whether new requests go to an engine: engines of two turbofits may have one name."""
        return any(
            one.name == name and url in (None, one.url) and not one.draining
            for one in self.routing_table.members
        )

    def outstanding(self) -> dict[str, int]:
        return dict(self._busy)

    def health(self) -> dict[str, bool]:
        return dict.fromkeys(self._busy, True)

    def _idle(self, name: str) -> None:
        if self._busy.get(name) and not self.sends_to(name):
            self._busy[name] = 0


class FleetGatewayThread:
    """In place of `gateway.thread.GatewayThread`.

    Args:
        world: where it is.
        gateway: what it serves with.
    """

    def __init__(self, world: ClusterWorld, gateway: FleetGateway) -> None:
        self._world, self.gateway = world, gateway
        self.alive, self.url = False, f"http://10.0.0.1:{world.new_pid()}"

    def start(self) -> None:
        process = self._world.scheduler.process
        assert process is not None
        process.ends.append(self.stop)
        self.alive = True
        self._world.fronts.append(self)
        self._world.gateways_changed()

    def call(self, act: Callable[[FleetGateway], Any]) -> Any:
        return act(self.gateway)

    def strike(self) -> None:
        pass

    def stop(self, *, drain: bool = False) -> None:  # noqa: ARG002 - it takes no time
        if self.alive:
            self.alive = False
            self._world.fronts.remove(self)


class ExtraGateway:
    """One `turbofit gateway`.

    Args:
        world: where it runs.
        coordinator: of the cluster that it joins.
    """

    def __init__(self, world: ClusterWorld, coordinator: CoordinatorActor) -> None:
        self.world, self.silent_until = world, 0.0
        self._coordinator = coordinator
        self._stopped = False
        self.process = Process(world.new_pid())
        world.trace(f"gateway {self.process.pid} starts")
        world.scheduler.thread(self._run, self.process)

    def _late(self) -> float:
        return max(0.0, self.silent_until - self.world.scheduler.now)

    def stop(self) -> None:
        """SIGTERM."""
        self._stopped = True

    def kill(self) -> None:
        """SIGKILL: it gives its place back to nobody."""
        self.world.trace(f"gateway {self.process.pid} is killed")
        self.world.scheduler.end(self.process)

    def _run(self) -> None:
        world = self.world
        attending = _Attending(
            self._coordinator.handle(self._late),
            f"10.0.1.{self.process.pid % 200}",
            GatewayConfig(),
            None,
        )
        said = "SIGTERM"
        try:
            attending.open()
            while not self._stopped:
                attending.tick()
                world.scheduler.sleep(_TICK)
        except TurbofitError as exc:
            said = exc.message
        finally:
            attending.close(drain=False)
        world.trace(f"gateway {self.process.pid} ends: {said}")
        world.scheduler.end(self.process)
