"""The controller of `turbofit serve --cluster ray` plans all nodes and keeps an actor on each node.

A task measures each node. All nodes' plans promise clients the same image limit and context. A
node's actor runs a `turbofit serve` with the node's plan, or says why the node serves nothing. The
front runs in the controller's process and asks the actors for addresses. A normal end ends the
actors and their servers. If the controller is killed, the servers continue for ten minutes. A new
controller of the same request then takes the actors over.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from secrets import token_hex
from typing import Any, Final

from msgspec.structs import replace

from turbofit.core.cluster import Cluster, ClusterPlan, Node, NodePlan, NodeStatus
from turbofit.core.errors import LaunchError
from turbofit.core.messages import BESIDE_COMMANDS, plural
from turbofit.core.process.files import digest_of_parts, needed_state_dir
from turbofit.core.process.signals import StopSignal
from turbofit.core.version import __version__
from turbofit.gateway.front import Front
from turbofit.gateway.server import GatewayThread
from turbofit.planning.cluster_plan import common_promise
from turbofit.planning.plan import plan_cluster, refusal
from turbofit.serving.access_log import access_log
from turbofit.serving.cluster import ray_adapter
from turbofit.serving.cluster.actors import (
    actor_name,
    address_source,
    ask_statuses,
    last_number,
    measured,
    node_actors,
)
from turbofit.serving.cluster.node import DRAINED, NodeActor
from turbofit.serving.options import ClusterServeConfig

_TICK: Final = 0.5
#: The most seconds to wait for the measurement of nodes.
_MEASURE_SECONDS: Final = 45.0
#: Seconds until an unfit node joins again. Meanwhile the memory of a killed server becomes free.
_PAUSE: Final = 15.0
#: Seconds to wait for the servers' end after the drain.
_LAST_SECONDS: Final = 20.0
#: Seconds to wait for the answers of an earlier controller's actors.
_TAKE_SECONDS: Final = 20.0
#: States of a node that serves nothing until the node gets another plan.
_EMPTY: Final = {"drained", "unfit"}


@dataclass(eq=False)
class NodeState:
    """A node of the cluster at the controller's last look.

    ``ray`` is Ray's own description. ``status`` is the answer of the node's actor, None if the
    actor does not answer. ``planned`` is the plan of the actor. ``again`` is the earliest time
    (monotonic, in seconds) at which the node may get a new plan.
    """

    ray: Node
    actor: Any = None
    status: NodeStatus | None = None
    planned: NodePlan | None = None
    again: float = 0.0

    @property
    def joins(self) -> bool:
        """True if the time `again` has passed, and the node has no actor or is unfit."""
        unfit = self.status is not None and self.status.state == "unfit"
        return (self.actor is None or unfit) and time.monotonic() >= self.again


class Controller:
    """Measures, plans and watches all nodes of a run.

    ``plan`` is the first plan, None before this plan is made. Clients are promised its image limit
    and context.
    """

    def __init__(
        self, address: str, config: ClusterServeConfig, stop: StopSignal, say: Callable[[str], None]
    ) -> None:
        self._address, self._config, self._stop, self._say = address, config, stop, say
        self.nodes: dict[str, NodeState] = {}
        self.plan: ClusterPlan | None = None
        #: The numbers of new actors; the newest actor of a node has the largest number.
        self._numbers = count(1)
        #: Identifies the request: an actor with another claim is not taken over.
        self._claim = digest_of_parts(
            __version__, config.request.model_dump_json(), *config.node_words
        )

    def take_over(self) -> None:
        """Take over the actors that an earlier controller left, with their promise.

        Actors with another request, other options or another version of turbofit are ended, and so
        are actors that do not answer.
        """
        alive, actors = ray_adapter.nodes(self._address), node_actors(self._config.name)
        calls = {node: actor.taken_over.remote(self._claim) for node, actor in actors.items()}
        answers = zip(calls, ray_adapter.outcomes([*calls.values()], _TAKE_SECONDS), strict=True)
        for node, planned in answers:
            if isinstance(planned, NodePlan) and node in alive:
                self.nodes[node] = NodeState(alive[node], actors.pop(node), planned=planned)
        taken_over = [node.planned for node in self.nodes.values() if node.planned is not None]
        plans = [planned.plan for planned in taken_over if planned.plan is not None]
        if plans:
            self.plan = ClusterPlan(
                turbofit_version=__version__, created=plans[0].created, fits=True,
                verdict=f"taken over from an earlier controller, with its promise: {len(plans)} "
                f"{plural(len(plans), 'node')}",
                model=plans[0].model, workload=plans[0].workload, promise=common_promise(plans),
                nodes=tuple(taken_over),
            )  # fmt: skip
            self._say(self.plan.verdict)
        if actors:
            self._say("ending the other actors that an earlier controller left")
            self._end(actors)
            # Ray frees the GPUs of ended actors late; until then, these nodes could serve nothing.
            end = time.monotonic() + _PAUSE
            while self._hold_gpus(actors) and time.monotonic() < end:
                time.sleep(_TICK)

    def tick(self) -> None:
        """Look at the nodes and their actors once; measure and plan the nodes that join.

        Raises:
            DoesNotFitError: the first plan of the cluster does not fit.
        """
        self._look()
        first = self.plan is None
        joining = [node for node in self.nodes.values() if first or node.joins]
        if not joining:
            return
        nodes = measured([node.ray for node in joining], _MEASURE_SECONDS)
        cluster = Cluster(source=f"ray {self._address}", nodes=nodes)
        plan = plan_cluster(self._config.request, cluster, self.plan)
        if first:
            warnings = [text for text in plan.warnings if not text.startswith(BESIDE_COMMANDS)]
            self._say("\nwarning: ".join((plan.verdict, *warnings)))
            if not plan.fits:
                raise refusal(plan)
            self.plan = plan
        for node, planned in zip(joining, plan.nodes, strict=True):
            self._keep(node, planned)

    def follow(
        self, front: GatewayThread[Front], on_open: Callable[[list[str]], None]
    ) -> signal.Signals:
        """Serve until a signal comes; return the signal.

        Raises:
            LaunchError: no node has served yet, and none can.
        """
        front.start()
        opened = False
        while self._stop.signal is None:
            self.tick()
            known = [node.status for node in self.nodes.values()]
            if not opened and all(node is not None and node.state in _EMPTY for node in known):
                raise LaunchError(
                    "no node serves", hint="each node's reason is above, and in its serve.log"
                )
            if not opened and front.call(lambda app: app.fleet.open):
                opened = True
                on_open([front.url])
            time.sleep(_TICK)
        return self._stop.signal

    def end(self) -> None:
        """End all servers normally, and free all GPUs."""
        nodes = self.nodes.values()
        self._end({node.ray.id: node.actor for node in nodes if node.actor is not None})

    def _end(self, actors: Mapping[str, Any]) -> None:
        """End the servers of these actors normally, wait for their drain, then end the actors."""
        # Even an urgent end tells the actors first; otherwise their servers would continue.
        ray_adapter.outcomes([actor.end.remote() for actor in actors.values()], 10.0)
        end = time.monotonic() + self._config.timing.drain + _LAST_SECONDS
        while not self._stop.urgent and time.monotonic() < end:
            if all(status.state in _EMPTY for status in ask_statuses(actors)):
                break
            time.sleep(_TICK)
        for actor in actors.values():
            ray_adapter.kill_actor(actor)

    def _hold_gpus(self, nodes: Container[str]) -> bool:
        """Return whether Ray counts GPUs of these nodes as held, by actors or other jobs."""
        return any(
            node.gpus and node.why_not and node.id in nodes
            for node in ray_adapter.nodes(self._address).values()
        )

    def _look(self) -> None:
        """Update all nodes from Ray and their actors, and print what has changed.

        The server of a leaving node is ended, and the GPUs of a drained node become free.
        """
        self._numbers = count(last_number(self._config.name) + 1)
        alive, actors = ray_adapter.nodes(self._address), node_actors(self._config.name)
        statuses = {status.id: status for status in ask_statuses(actors, "keep_alive")}
        for identity in self.nodes.keys() - alive.keys():
            self._say(f"node {self.nodes.pop(identity).ray.name} has left the cluster")
        for identity, ray in alive.items():
            node, status = self.nodes.setdefault(identity, NodeState(ray)), statuses.get(identity)
            before, node.status = node.status, status
            node.ray = ray
            if identity not in actors:
                node.actor = None
            if status is None:
                continue
            if before is None or before.state != status.state:
                self._say(f"node {ray.name}: {status.state} {status.url or status.why_not}")
            if ray.leaving:
                node.actor.end.remote()
            if status.at_once:  # the job that holds the GPUs is our own actor
                node.ray = replace(ray, why_not="")
            # The new actor of a drained node takes no GPUs, so they become free for other jobs.
            if status.state == "drained" and status.at_once:
                left = NodePlan(node=identity, name=ray.name, address=ray.address, why_not=DRAINED)
                self._keep(node, left)
            elif status.state != "unfit":
                # The pause before an unfit node joins again begins when the node becomes unfit.
                node.again = time.monotonic() + _PAUSE

    def _keep(self, node: NodeState, planned: NodePlan) -> None:
        """Give a node a new actor that serves a plan, or says why the node serves nothing."""
        run, before = self._config.name, node.planned
        node.planned, node.again = planned, time.monotonic() + _PAUSE
        if node.actor is not None:
            if planned.plan is None and planned == before:
                return  # the present actor gives the same reason
            ray_adapter.kill_actor(node.actor)
        gpus = 0 if planned.plan is None else node.ray.gpus
        node.actor = ray_adapter.start_actor(
            NodeActor, run, planned, self._config.node_words, token_hex(32), self._claim,
            node=node.ray.id, gpus=gpus,
            name=actor_name(run, node.ray.id, next(self._numbers)),
        )  # fmt: skip


def serve_cluster(
    config: ClusterServeConfig,
    stop: StopSignal,
    *,
    say: Callable[[str], None],
    on_open: Callable[[list[str]], None],
) -> signal.Signals:
    """Serve a model on a Ray cluster until a signal; return the signal.

    Call this in the main thread.

    Raises:
        LaunchError: the cluster has a run of this name already, or no node can serve.
    """
    with ray_adapter.connected(config.address) as address:
        stop.rearm()  # Ray has replaced the handler of SIGTERM
        controller = Controller(address, config, stop, say)
        public = config.gateway.changed(drain_seconds=config.timing.drain, pretend=config.pretend)
        folder = needed_state_dir(f"clusters/{config.name}")
        log = access_log(config.access_log or f"{folder}/access.log")
        held = ray_adapter.held_name(config.name)
        if held is None:
            raise LaunchError(
                f"{config.name} is served on this cluster already",
                hint="turbofit cluster status shows that run; --name gives this run another name",
            )
        front = GatewayThread(Front(address_source(config.name), public, log))
        stop.abrupt = False
        try:
            controller.take_over()
            return controller.follow(front, on_open)
        finally:
            stop.on_second(front.cut_off)
            if front.alive and not stop.urgent:
                say("draining: running requests may end")
            front.stop(drain=not stop.urgent)
            with suppress(Exception):  # without Ray, nodes end by themselves
                controller.end()
            stop.abrupt = stop.signal is None
