"""The controller of `turbofit serve --cluster ray`; each node is a `turbofit serve` of an actor.

It has each node measured by a task, plans all of them under one promise, and keeps one actor a node
that serves the node's plan or says why it serves nothing; the front asks the actors for addresses.
It keeps no state: the actors and their servers outlive a controller that is killed, and the next
one asks them what they serve. A node whose plan is still the same then serves on.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from turbofit.core.cluster import Cluster, ClusterPlan, Node, NodePlan, NodeStatus
from turbofit.core.errors import LaunchError
from turbofit.core.messages import BESIDE_COMMANDS
from turbofit.core.process.files import state_dir
from turbofit.core.version import __version__
from turbofit.gateway.front import Front
from turbofit.gateway.http.accesslog import access_log
from turbofit.gateway.server import GatewayThread
from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster.actors import address_source, node_actors, told
from turbofit.launch.cluster.node import NodeActor, Wanted
from turbofit.launch.cluster.nodes import measure_here, node_of
from turbofit.planning.plan import refusal
from turbofit.planning.plan_cluster import plan_cluster

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

    from turbofit.launch.serve.config import ClusterServeConfig
    from turbofit.launch.serve.supervisor import StopSignal

_TICK: Final = 0.5
#: Seconds until an unfit node joins again; the memory of a killed server is free by then.
_PAUSE: Final = 15.0
#: Actors that nobody has asked for so many seconds have no controller.
_OWNED: Final = 4.0
#: Seconds after the drain in which servers must end.
_LAST_SECONDS: Final = 20.0
#: States of a node that serves nothing and will not by itself.
_EMPTY: Final = {"drained", "unfit"}


@dataclass(eq=False)
class NodeState:
    """One node at the last look: as Ray tells it, its actor, and what that tells; None if silent.

    ``serves`` is the digest of what the actor was started for; ``task`` measures the node, which
    joins at ``again`` or later; ``said`` was said of it last.
    """

    ray: Node
    actor: Any = None
    status: NodeStatus | None = None
    serves: str = ""
    task: Any = None
    measured: Node | None = None
    again: float = 0.0
    said: str = ""


class Controller:
    """All nodes of a run; ``plan`` has the promise that clients know, once there is one."""

    def __init__(
        self, address: str, config: ClusterServeConfig, stop: StopSignal, say: Callable[[str], None]
    ) -> None:
        self._address, self._config, self._stop, self._say = address, config, stop, say
        self.nodes: dict[str, NodeState] = {}
        self.plan: ClusterPlan | None = None

    def adopt(self) -> None:
        """Take over the actors that an earlier controller of this run has left.

        Raises:
            LaunchError: that controller still runs.
        """
        actors = node_actors(self._config.name)
        if any(status.silent < _OWNED for status in told(actors)):
            time.sleep(_OWNED)
            if any(status.silent < _OWNED for status in told(actors)):
                raise LaunchError(
                    f"{self._config.name} is served on this cluster already",
                    hint="turbofit cluster status shows it; --name gives this one another name",
                )
        for identity, ray in ray_adapter.nodes(self._address).items():
            node = self.nodes[identity] = NodeState(ray)
            if identity in actors:
                wanted = ray_adapter.outcome(actors[identity].wanted.remote(), _LAST_SECONDS)
                if isinstance(wanted, Wanted) and wanted.planned.plan is not None:
                    # The node as it was before its server took memory.
                    machine = wanted.planned.plan.machine
                    node.measured = replace(ray, machine=machine, why_not="")
                    node.serves = wanted.digest

    def tick(self) -> None:
        """Hear what the actors tell, and plan for the nodes that join.

        Raises:
            DoesNotFitError: at the first plan, no node keeps the promise.
        """
        self._look()
        joining = [node for node in self.nodes.values() if self._joins(node)]
        ready = [node for node in joining if self._measured(node)]
        if not ready or (self.plan is None and len(ready) < len(self.nodes)):
            return
        nodes = tuple(node.measured or node.ray for node in ready)
        cluster = Cluster(source=f"ray {self._address}", nodes=nodes)
        plan = plan_cluster(self._config.request, cluster, self.plan)
        if self.plan is None:
            warnings = (text for text in plan.warnings if not text.startswith(BESIDE_COMMANDS))
            for text in (plan.verdict, *(f"warning: {warning}" for warning in warnings)):
                self._say(text)
            if not plan.fits:
                raise refusal(plan)
            self.plan = plan
        for node, planned in zip(ready, plan.nodes, strict=True):
            self._keep(node, planned)

    def follow(self, front: GatewayThread[Front], on_open: Callable[[list[str]], None]) -> None:
        """Serve until a signal comes.

        Raises:
            LaunchError: no node can serve, from the beginning.
        """
        front.start()
        opened = False
        while self._stop.signal is None:
            self.tick()
            states = {node.status.state for node in self.nodes.values() if node.status is not None}
            if not opened and self.plan is not None and states and states <= _EMPTY:
                said = "; ".join(node.said for node in self.nodes.values())
                raise LaunchError(f"no node serves: {said}", hint="turbofit doctor, on the nodes")
            if not opened and front.call(lambda app: app.fleet.open):
                opened = True
                on_open([front.url])
            time.sleep(_TICK)

    def end(self) -> None:
        """End all servers normally, and free all GPUs; a lost actor's server ends by its lease."""
        actors = node_actors(self._config.name)
        # Even an urgent end waits until the actors know; otherwise their servers would continue.
        calls = [actor.end.remote() for actor in actors.values()]
        ray_adapter.outcomes(calls, _LAST_SECONDS)
        end = time.monotonic() + self._config.timing.drain + _LAST_SECONDS
        while not self._stop.urgent and time.monotonic() < end:
            if all(status.state in _EMPTY for status in told(actors, renew=True)):
                break
            time.sleep(_TICK)
        for actor in actors.values():
            ray_adapter.kill_actor(actor)

    def _look(self) -> None:
        """Look at all nodes: those that have come or left, and what has become of the others."""
        alive, actors = ray_adapter.nodes(self._address), node_actors(self._config.name)
        statuses = {status.id: status for status in told(actors, renew=True)}
        for identity in self.nodes.keys() - alive.keys():
            self._say(f"node {self.nodes.pop(identity).ray.name} has left the cluster")
        for identity, ray in alive.items():
            node = self.nodes.setdefault(identity, NodeState(ray))
            status = statuses.get(identity)
            node.ray, node.actor, node.status = ray, actors.get(identity), status
            if status is None:
                continue
            if ray.leaving:
                node.actor.end.remote(drained=True)
            said = f"{status.state} {status.url or status.why_not}"
            if said != node.said:
                self._say(f"node {ray.name}: {said}")
                node.said = said
            if status.state != "unfit":
                node.again = time.monotonic() + _PAUSE
            if status.state == "drained" and status.at_once:  # its GPUs are given back
                why = "it is drained until it leaves the cluster"
                left = NodePlan(node=identity, name=ray.name, address=ray.address, why_not=why)
                self._keep(node, replace(left, cards=status.cards))

    def _joins(self, node: NodeState) -> bool:
        """Whether the node is to be planned for: there is no plan yet, or it is new, or unfit."""
        unfit = node.status is not None and node.status.state == "unfit"
        again = (node.actor is None or unfit) and time.monotonic() >= node.again
        return self.plan is None or again

    def _measured(self, node: NodeState) -> bool:
        """Whether the node is measured, by a task there, or cannot be."""
        holds = node.status is not None and node.status.at_once
        if node.measured is None and node.ray.why_not and not holds:
            node.measured = node.ray
        if node.measured is None:
            node.task = node.task or ray_adapter.run_on(node.ray.id, measure_here, __version__)
            answer = ray_adapter.outcome(node.task, 0)
            if answer is not None:
                node.task, node.measured = None, node_of(node.ray, answer)
        return node.measured is not None

    def _keep(self, node: NodeState, planned: NodePlan) -> None:
        """Have a node's actor serve this plan, or say why it serves nothing."""
        run, words, status = self._config.name, self._config.node_words, node.status
        wanted = Wanted(planned=planned, words=words, key=token_hex(32))
        ended = status is not None and status.at_once and status.state in _EMPTY
        node.measured, node.again = None, time.monotonic() + _PAUSE
        if node.actor is not None and node.serves == wanted.digest and not ended:
            return
        if node.actor is not None:
            ray_adapter.kill_actor(node.actor)
        node.serves, gpus = wanted.digest, 0 if planned.plan is None else node.ray.gpus
        # The newest actor of a node is the last one by name.
        name = f"{run}/{node.ray.id}/{time.time():.3f}"
        ray_adapter.start_actor(NodeActor, run, wanted, node=node.ray.id, gpus=gpus, name=name)


def serve_cluster(
    config: ClusterServeConfig,
    stop: StopSignal,
    *,
    say: Callable[[str], None],
    on_open: Callable[[list[str]], None],
) -> signal.Signals:
    """Measure, plan, launch, and serve until a signal. Call it in the main thread."""
    with ray_adapter.connected(config.address) as address:
        stop.rearm()  # Ray takes SIGTERM
        controller = Controller(address, config, stop, say)
        assert config.gateway is not None
        public = replace(config.gateway, drain_seconds=config.timing.drain, pretend=config.pretend)
        log = access_log(config.access_log or f"{state_dir(f'clusters/{config.name}')}/access.log")
        tls, source = ray_adapter.client_context(os.environ), address_source(config.name)
        front = GatewayThread(Front((), public, log, source, tls))
        controller.adopt()
        stop.abrupt = False
        try:
            controller.follow(front, on_open)
        finally:
            stop.on_second(front.cut_off)
            if front.alive and not stop.urgent:
                say("draining: what is under way may end")
            front.stop(drain=not stop.urgent)
            with suppress(Exception):  # Ray may be gone: then nodes end by their lease
                controller.end()
            stop.abrupt = stop.signal is None
        assert stop.signal is not None
        say(f"stopping: {stop.signal.name}")
        return stop.signal
