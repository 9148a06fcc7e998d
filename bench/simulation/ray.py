"""A simulated Ray: what `launch.cluster.ray_adapter` offers, in virtual time and without Ray.

Nodes with GPUs, placement groups of one GPU, tasks, and actors that host an engine each: here the
engine is simulated too (`ready`, `failed`, `ended` after some time).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace
from turbofit.launch.cluster.engine_spec import EngineState

from bench.simulation.scheduler import Event
from turbofit.core.cluster import Node
from turbofit.core.machine import Machine
from turbofit.launch.cluster.ray_adapter import (
    ActorDiedError,
    ActorRestartsError,
    NodeLostError,
    ResultTimeoutError,
)

if TYPE_CHECKING:
    from turbofit.launch.cluster.engine_spec import EngineSpec

    from bench.simulation.cluster_world import ClusterWorld

__all__ = ["Actor", "Handle", "Method", "RayMachine", "Ref", "SimulatedRay"]

#: Seconds until Ray has begun a task, a group or an actor, at most.
_SOON = 2.0
_LOAD = (5.0, 90.0)
_ERROR = {"kind": "launch", "message": "simulated", "hint": "none", "exit_code": 5}


class Ref:
    """A result that is there, or comes; ``awaited``: somebody looks as soon as it is there."""

    def __init__(self, ray: SimulatedRay, *, awaited: bool = True) -> None:
        self._ray, self.awaited = ray, awaited
        self.done = False
        self.value: Any = None
        self.error: Exception | None = None

    def give(self, value: Any) -> None:
        if not self.done:
            self.done, self.value = True, value
            self._tell()

    def fail(self, error: Exception) -> None:
        if not self.done:
            self.done, self.error = True, error
            self._tell()

    def _tell(self) -> None:
        if self.awaited:
            self._ray.stir()


class RayMachine:
    """A node.

    ``taken``: by GPU, the group that has it, or None where another job does. ``measuring``: seconds
    that a task takes there to measure it.
    """

    def __init__(self, identity: str, name: str, machine: Machine) -> None:
        self.id, self.name, self.machine = identity, name, machine
        self.address = f"10.0.0.{1 + int(identity, 16) % 200}"
        self.gpus = [str(gpu.index) for gpu in machine.gpus]
        self.taken: dict[str, Group | None] = {}
        self.alive, self.leaving, self.measuring = True, False, 1.0


class Group:
    """A placement group of one GPU; ``gpu`` is empty until there is one."""

    def __init__(self, ray: SimulatedRay, node: RayMachine) -> None:
        self.node, self.gpu, self.removed = node, "", False
        self.ready = Event(ray.world.scheduler)


class Method:
    """``handle.method.remote(...)``."""

    def __init__(self, call: Callable[..., Ref]) -> None:
        self.remote = call


class Handle:
    """An actor's; calls that are under way fail with its process."""

    def __init__(self, ray: SimulatedRay) -> None:
        self._ray = ray
        self._refs: list[Ref] = []

    def _keep(self, ref: Ref) -> None:
        self._refs = [one for one in self._refs if not one.done]
        self._refs.append(ref)

    def _fail(self, error: Exception) -> None:
        refs, self._refs = self._refs, []
        for ref in refs:
            ref.fail(error)


class Actor(Handle):
    """The actor of one engine."""

    def __init__(self, ray: SimulatedRay, spec: EngineSpec, group: Group, restarts: int) -> None:
        super().__init__(ray)
        self.spec, self.group, self._restarts = spec, group, restarts
        self.alive, self.runs = True, False
        self.peers: tuple[str, ...] = spec.peers
        self.state = EngineState()
        self._life = 0
        self._waiting: list[tuple[int, Ref]] = []
        self.follow = Method(self._follow)
        self.allow = Method(self._allow)
        self.stop = Method(self._stop)
        self._begin(ray.world.rng.uniform(0.1, _SOON))

    @property
    def gpus(self) -> set[str]:
        return {str(index) for index in self.spec.plan.parallel.groups[0]}

    def end_process(self) -> None:
        """Its process dies; Ray starts it again, so many times."""
        if not self.alive:
            return
        if self._restarts == 0:
            self.die("its process died too often")
            return
        self._restarts -= 1
        self.runs, self._life = False, self._life + 1
        self._fail(ActorRestartsError("its process died (simulated)"))
        self._begin(self._ray.world.rng.uniform(1.0, 10.0))

    def fail(self) -> None:
        """Its engine fails for good."""
        self._tell(state="failed", error=_ERROR)

    def die(self, why: str) -> None:
        """It is gone for good."""
        if self.alive:
            self.alive = self.runs = False
            self._life += 1
            self._fail(ActorDiedError(f"{why} (simulated)"))

    def _begin(self, seconds: float) -> None:
        life, world = self._life, self._ray.world

        def go() -> None:
            if life != self._life or not self.alive:
                return
            self.runs, self.peers = True, self.spec.peers
            world.engine_begins(self)
            self.state = EngineState(pid=world.new_pid())
            self._tell()  # those who asked before it ran
            world.scheduler.after(world.rng.uniform(*_LOAD), ready)

        def ready() -> None:
            if life != self._life or self.state.state != "starting":
                return
            if world.fails():
                self.fail()
            else:
                self._tell(state="ready", url=f"http://{self.group.node.address}:{self.state.pid}")

        world.scheduler.after(seconds, go)

    def _tell(self, **facts: Any) -> None:
        if not self.runs:
            return
        self.state = replace(self.state, number=self.state.number + 1, **facts)
        waiting, self._waiting = self._waiting, []
        for since, ref in waiting:
            if self.state.number > since:
                ref.give(self.state)
            else:
                self._waiting.append((since, ref))

    def _follow(self, since: int, seconds: float) -> Ref:  # noqa: ARG002 - as long as it takes
        ref = self._ref()
        if ref.done:
            return ref
        if self.runs and self.state.number > since:
            ref.give(self.state)
        else:
            self._waiting.append((since, ref))
        return ref

    def _allow(self, peers: tuple[str, ...]) -> Ref:
        ref = self._ref()
        if not ref.done:
            self.peers = peers
            ref.give(None)
        return ref

    def _stop(self, seconds: float) -> Ref:  # noqa: ARG002 - it takes less
        ref, world = self._ref(), self._ray.world
        world.engine_stops(self)

        def ended() -> None:
            self._tell(state="ended")
            ref.give(True)

        if not ref.done:
            world.scheduler.after(world.rng.uniform(0.1, 5.0), ended)
        return ref

    def _ref(self) -> Ref:
        ref = Ref(self._ray)
        if not self.alive:
            ref.fail(ActorDiedError("it is gone (simulated)"))
        elif not self.runs and self._life:
            ref.fail(ActorRestartsError("it starts again (simulated)"))
        else:
            self._keep(ref)
        return ref

    def _fail(self, error: Exception) -> None:
        self._waiting.clear()
        super()._fail(error)


class _Task:
    def __init__(self, ray: SimulatedRay, function: Any) -> None:
        self._ray, self._name = ray, function.__name__

    def start(self, strategy: Any, *_: Any) -> Ref:
        ray, ref = self._ray, Ref(self._ray)
        group = strategy if isinstance(strategy, Group) else None
        node = strategy if group is None else group.node

        def done() -> None:
            if not node.alive or (group is not None and group.removed):
                ref.fail(NodeLostError("the node is gone (simulated)"))
            elif group is not None:
                ref.give([group.gpu])
            else:
                told = Node(id="", name=node.name, address="", machine=node.machine)
                ref.give(msgspec.json.encode(told))

        seconds = ray.world.rng.uniform(0.1, _SOON) + (node.measuring if group is None else 0.0)
        ray.world.scheduler.after(seconds, done)
        return ref


class SimulatedRay:
    """The cluster; its methods stand in the place of `ray_adapter`'s functions."""

    def __init__(self, world: ClusterWorld) -> None:
        self.world = world
        self.machines: dict[str, RayMachine] = {}
        self.groups: list[Group] = []
        self.actors: list[Actor] = []
        self._stirred = Event(world.scheduler)

    # -- what happens to it

    def stir(self) -> None:
        """Whoever waits looks now."""
        self._stirred.poke()

    def lose(self, node: RayMachine) -> None:
        """A node dies, and what runs there."""
        node.alive = False
        del self.machines[node.id]
        for actor in [one for one in self.actors if one.group.node is node]:
            actor.die("its node died")
            self.actors.remove(actor)
        self.groups = [one for one in self.groups if one.node is not node]
        self.stir()

    def free(self, node: RayMachine) -> list[str]:
        return [gpu for gpu in node.gpus if gpu not in node.taken]

    def disconnect(self) -> None:
        """The process that was connected ends: what it started goes."""
        for actor in list(self.actors):
            self.kill_actor(actor)
        for group in list(self.groups):
            self.remove_group(group)

    def give(self) -> None:
        """GPUs that are free to groups that wait for them."""
        for group in self.groups:
            free = self.free(group.node)
            if not group.gpu and free:
                group.gpu = self.world.rng.choice(free)  # Ray chooses which
                group.node.taken[group.gpu] = group
                group.ready.set()

    # -- what turbofit calls

    def free_gpus(self) -> dict[str, int]:
        return {node.id: len(self.free(node)) for node in self.machines.values()}

    def create_gpu_group(self, node: str) -> Group:
        group = Group(self, self.on_node(node))
        if group.node.alive:
            self.groups.append(group)
        self.world.scheduler.after(self.world.rng.uniform(0.0, 0.5), self.give)
        return group

    def group_ready(self, group: Group, seconds: float) -> bool:
        return group.ready.wait(seconds) and not group.removed

    def remove_group(self, group: Group) -> None:
        if group.removed:
            return
        group.removed = True
        if group in self.groups:
            self.groups.remove(group)
        for actor in [one for one in self.actors if one.group is group]:
            self.kill_actor(actor)
        if group.gpu:
            group.node.taken.pop(group.gpu, None)
            self.give()

    def in_group(self, group: Group) -> Group:
        return group

    def on_node(self, node: str) -> RayMachine:
        return self.machines.get(node) or _gone(node)

    def task(self, function: Any, *, gpus: int = 0) -> _Task:  # noqa: ARG002
        return _Task(self, function)

    def start_actor(
        self, _kind: type, spec: EngineSpec, *, strategy: Group, restarts: int, **_: Any
    ) -> Actor:
        actor = Actor(self, spec, strategy, restarts)
        if strategy.removed or not strategy.node.alive:
            actor.die("its group is gone")
        else:
            self.actors.append(actor)
        return actor

    def kill_actor(self, actor: Actor) -> None:
        actor.die("it was killed")
        if actor in self.actors:
            self.actors.remove(actor)

    def result(self, ref: Ref, seconds: float) -> Any:
        ref.awaited |= seconds > 0
        self._stirred.wait_for(lambda: ref.done, seconds)
        if not ref.done:
            raise ResultTimeoutError("no result yet (simulated)")
        if ref.error is not None:
            raise ref.error
        return ref.value

    def wait_all(self, refs: Collection[Ref], seconds: float) -> set[Ref]:
        self._stirred.wait_for(lambda: all(ref.done for ref in refs), seconds)
        return {ref for ref in refs if ref.done}

    def wait_any(self, refs: Collection[Ref], seconds: float) -> set[Ref]:
        """Ends too where anything else has happened: a look at the nodes may be worth it."""
        if not any(ref.done for ref in refs):
            self._stirred.wait(seconds)
        return {ref for ref in refs if ref.done}


def _gone(identity: str) -> RayMachine:
    node = RayMachine(identity, "gone", Machine(name="nothing", source="simulated", gpus=()))
    node.alive = False
    return node
