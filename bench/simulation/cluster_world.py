"""The world of a simulated cluster: Ray, time, threads, and plans that are remembered."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from bench.simulation.cluster_gateways import (
    CoordinatorActor,
    FleetGateway,
    FleetGatewayThread,
    SimulatedCondition,
)
from bench.simulation.history import History
from bench.simulation.modules import SimulatedThread, SimulatedTime, current
from bench.simulation.ray import Actor, SimulatedRay
from turbofit.core.cluster import Cluster, ClusterPlan, Node, NodePlan
from turbofit.gateway import server, thread
from turbofit.launch.cluster import (
    admin_commands,
    controller,
    coordinator,
    extra_gateway,
    places,
    ray_adapter,
    replica,
    run,
)
from turbofit.launch.cluster.connect import RayNode
from turbofit.planning.cluster import plan_cluster, plan_joining
from turbofit.planning.request import PlanRequest

__all__ = ["ClusterWorld", "SimulatedConnection", "cluster_in_place", "planned"]

#: Functions of `ray_adapter` that are `SimulatedRay`'s.
_NAMES = ("free_gpus", "create_gpu_group", "group_ready", "remove_group", "in_group", "on_node",
          "start_actor", "kill_actor", "result", "wait_all", "wait_any")  # fmt: skip


class ClusterWorld(History):
    """The state of one history.

    Args:
        seed: decides everything.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.rng = random.Random(f"cluster {seed}")
        self.ray = SimulatedRay(self)
        #: How many engines from now on fail at their start.
        self.failing = 0
        #: The gateways that serve, that of `turbofit serve` and others.
        self.fronts: list[FleetGatewayThread] = []
        self.coordinator: CoordinatorActor | None = None
        #: Whether turbofit ends, and its engines with it.
        self.ending = False

    def fails(self) -> bool:
        """Whether the engine that starts now does."""
        self.failing -= self.failing > 0
        return self.failing > 0

    def engine_begins(self, actor: Actor) -> None:
        """No two engines on a GPU, and none on one that another job has, or nobody holds."""
        node = actor.group.node
        for gpu in actor.gpus:
            group = node.taken.get(gpu)
            if group is None:
                self.violate(f"{actor.spec.name} begins on GPU {gpu}, which is not held")
        others = [one for one in self.ray.actors if one is not actor and one.group.node is node]
        for other in others:
            if other.alive and other.runs and other.gpus & actor.gpus:
                self.violate(f"{actor.spec.name} begins beside {other.spec.name}")
        self.trace(f"{actor.spec.name} begins")

    def gateways_changed(self) -> None:
        """All together send no more than the limits of the engines."""
        shares = sum(1 / one.gateway.routing_table.gateways for one in self.fronts)
        if shares > 1 + 1e-9:
            self.violate(f"{len(self.fronts)} gateways have {shares:.2f} of the limits")

    def engine_stops(self, actor: Actor) -> None:
        """Nobody sends to an engine that turbofit stops, or has anything there."""
        if self.ending or actor.state.state != "ready":
            return
        name = actor.spec.name
        for front in self.fronts:
            if front.gateway.sends_to(name, actor.state.url):
                self.violate(f"{name} is stopped while a gateway sends to it")


class SimulatedConnection:
    """In place of `connect.RayConnection`; a head that is silent tells what it told last."""

    address, here, here_address = "10.0.0.1:6379", "head", "10.0.0.1"

    def __init__(self, world: ClusterWorld) -> None:
        self._world = world
        self._told: dict[str, RayNode] = {}
        self.silent_until = 0.0

    def watched(self) -> dict[str, RayNode]:
        if self._world.scheduler.now >= self.silent_until:
            self._told = {
                one.id: RayNode(
                    id=one.id, name=one.name, address=one.address, gpus=len(one.gpus),
                    leaving=one.leaving,
                )
                for one in self._world.ray.machines.values()
            }  # fmt: skip
        return dict(self._told)


class _Worker:
    """A `ThreadPoolExecutor` of one thread."""

    def __init__(self, world: ClusterWorld) -> None:
        self._world = world
        self._waiting: list[tuple[Future[Any], Callable[[], Any]]] = []
        self._works = False

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.append((future, work))
        if not self._works:
            self._works = True
            self._world.scheduler.thread(self._run)
        return future

    def shutdown(self, **_: Any) -> None:
        self._waiting.clear()

    def _run(self) -> None:
        while self._waiting:
            future, work = self._waiting.pop(0)
            try:
                future.set_result(work())
            except Exception as exc:  # noqa: BLE001 - it is raised where it is asked for
                future.set_exception(exc)
            self._world.ray.stir()
        self._works = False


_CLUSTERS: dict[str, ClusterPlan] = {}
_JOINING: dict[str, NodePlan] = {}


def planned(request: PlanRequest, cluster: Cluster) -> ClusterPlan:
    """`plan_cluster`, which is remembered."""
    key = f"{request!r} {cluster.nodes!r}"
    if key not in _CLUSTERS:
        _CLUSTERS[key] = plan_cluster(request, cluster)
    return _CLUSTERS[key]


def _plan_joining(request: PlanRequest, plan: ClusterPlan, node: Node) -> NodePlan:
    """`plan_joining`, which is remembered: its plan is of the promise and of the node alone."""
    key = f"{request!r} {plan.longest_request_tokens} {plan.limits!r} {node!r}"
    if key not in _JOINING:
        _JOINING[key] = plan_joining(request, plan, node)
    return _JOINING[key]


def _put_gateways(world: ClusterWorld, stack: ExitStack) -> None:
    """What is told to gateways goes through turbofit's coordinator, at a tenth of its pace."""

    def make(routing_table: Any, *_: Any, **__: Any) -> FleetGateway:
        return FleetGateway(world, routing_table)

    def name() -> Any:
        return SimpleNamespace(hex=f"gateway-{world.new_pid()}")

    condition = SimpleNamespace(Condition=lambda: SimulatedCondition(world.scheduler))
    for module, replaced in (
        (server, {"make_routing_table_gateway": make}),
        (thread, {"GatewayThread": partial(FleetGatewayThread, world)}),
        (coordinator, {"threading": condition, "SILENT_SECONDS": 10 * coordinator.SILENT_SECONDS}),
        (extra_gateway, {"uuid4": name, "client_context": lambda _: None,
                         "threading": SimpleNamespace(Thread=SimulatedThread),
                         "_SILENT": 10 * extra_gateway._SILENT,
                         "_SECONDS": 10 * extra_gateway._SECONDS}),
        (run, {"_TICK": 30.0,
               "_WRITE_SECONDS": 10 * run._WRITE_SECONDS, "write_atomic": lambda *_, **__: None,
               "client_context": lambda _: None}),
    ):  # fmt: skip
        stack.enter_context(patch.multiple(module, **replaced))  # type: ignore[arg-type]


@contextmanager
def cluster_in_place(world: ClusterWorld) -> Iterator[None]:
    """The world in the place of Ray, time and threads."""
    clock = SimulatedTime()
    threading = SimpleNamespace(Thread=SimulatedThread)
    with ExitStack() as stack:
        for name in _NAMES:
            stack.enter_context(patch.object(ray_adapter, name, getattr(world.ray, name)))
        stack.enter_context(patch.object(ray_adapter, "Task", world.ray.task))
        for module in (controller, extra_gateway, places, replica, run):
            stack.enter_context(patch.object(module, "time", clock))
        _put_gateways(world, stack)
        stack.enter_context(patch.object(admin_commands, "plan_cluster", planned))
        stack.enter_context(patch.multiple(
            controller, threading=threading, plan_joining=_plan_joining,
            ThreadPoolExecutor=lambda *_: _Worker(world),
        ))  # fmt: skip
        current.append(world)  # type: ignore[arg-type]
        try:
            yield
        finally:
            current.pop()
