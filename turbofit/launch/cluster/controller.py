"""Keeps a cluster serving: nodes that join, leave or die, engines that fail, routing tables.

Everything happens in `Controller.tick`, which never waits: what takes time (measuring a node,
planning for it) is done by a worker, what engines do comes as news of their actors, and a change of
plan is a generator that goes one step a tick.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from turbofit.core.cluster import ClusterStatus, Node, NodePlan
from turbofit.core.errors import LaunchError, UsageError, error_from
from turbofit.gateway.limits.intersect import intersect
from turbofit.gateway.routing.fleet_updater import check_gateways
from turbofit.gateway.routing.routing_table import RoutingTable
from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster.agent import start_agent
from turbofit.launch.cluster.node_state import NodeState, outcome
from turbofit.launch.cluster.nodes import held_only, index_of, tell_nodes
from turbofit.launch.cluster.promise import (
    bounds_of_cluster,
    engine_specs_of,
    expected_members,
    in_words,
)
from turbofit.launch.cluster.replica import Replica
from turbofit.planning.cluster import plan_joining

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from turbofit.core.cluster import ClusterPlan
    from turbofit.launch.cluster.connect import RayConnection, RayNode
    from turbofit.launch.cluster.places import Places
    from turbofit.launch.serve.config import ClusterServeConfig

__all__ = ["Controller"]

_LOOK_SECONDS: Final = 1.0
#: A node that cannot serve, or whose engine failed for good, is tried again after so long.
_AGAIN_SECONDS: Final = 600.0
_EVENTS: Final = 50
_GIVE_SECONDS: Final = 10.0
#: Where a node's death ended its engines, Ray tells of the node a moment later.
_SURE_SECONDS: Final = 3.0


class Controller:
    """A model on a cluster.

    Args:
        connection: to Ray.
        places: the GPUs that are held.
        plan: what is served.
        node_states: the nodes that were measured for it.
        config: what every engine is started with.
        say: takes lines of progress.
        name: what people call it.
    """

    def __init__(  # noqa: PLR0913 - a constructor
        self,
        connection: RayConnection,
        places: Places,
        plan: ClusterPlan,
        node_states: list[NodeState],
        config: ClusterServeConfig,
        say: Callable[[str], None],
        *,
        name: str,
    ) -> None:
        self.connection, self.places, self.plan, self.config = connection, places, plan, config
        self.name = name
        self._say = say
        self.node_states = {node_state.node.id: node_state for node_state in node_states}
        self.bounds = bounds_of_cluster(plan)
        self.gateways = 1
        self.peers: tuple[str, ...] = (connection.here_address,)
        #: Requests at each engine, and whether it is up, as the gateways told last.
        self.outstanding: Mapping[str, int] = {}
        #: The routing table that all gateways followed when they told it.
        self.followed = -1
        self.up: Mapping[str, bool] = {}
        self.change = ""
        self.events: deque[str] = deque(maxlen=_EVENTS)
        self._steps: Iterator[None] | None = None
        self._number, self._told = 0, RoutingTable(number=0, bounds=self.bounds, members=())
        self._looked = float("-inf")
        self._hopeless: float | None = None
        self._worker = ThreadPoolExecutor(1, "nodes")

    def say(self, text: str) -> None:
        """Progress, which `status` shows too."""
        self.events.append(f"{time.strftime('%H:%M:%S')} {text}")
        self._say(text)

    def begin(self) -> None:
        """Start what is planned."""
        for node in self.plan.nodes:
            node_state = self.node_states.get(node.node)
            if node_state is not None:
                node_state.promised = self.plan
                self.settle(node_state, node)

    def tick(self, seconds: float) -> None:
        """One look at everything, after news or so many seconds.

        Raises:
            TurbofitError: nothing serves any more, and nothing will; or Ray is gone.
        """
        self._hear(seconds)
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            self._look(self.connection.watched())
        for node_state in tuple(self.node_states.values()):
            self._mind(node_state, now)
        if self._steps is not None and next(self._steps, self) is self:
            self._steps = None
        self._raise_if_nothing_serves()

    def routing_table(self) -> RoutingTable:
        """What gateways are to be told now."""
        members = tuple(
            member for node_state in self.node_states.values() for member in node_state.members()
        )
        told = self._told
        if (members, self.bounds, self.gateways) != (told.members, told.bounds, told.gateways):
            self._number += 1
            self._told = RoutingTable(
                number=self._number, bounds=self.bounds, members=members, gateways=self.gateways
            )
        return self._told

    def status(self, urls: tuple[str, ...]) -> ClusterStatus:
        """For people and scripts."""
        return ClusterStatus(
            name=self.name,
            model=self.plan.model.name,
            source=f"ray {self.connection.address}",
            pretend=self.config.pretend,
            at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            urls=urls,
            promise=in_words(self.plan),
            nodes=tuple(
                node_state.status(self.up, self.outstanding)
                for node_state in self.node_states.values()
            ),
            change=self.change,
            events=tuple(self.events),
        )

    def let(self, peers: tuple[str, ...]) -> None:
        """Gateways at these addresses may reach the engines from now on, and no others."""
        self.peers = peers
        for node_state in self.node_states.values():
            for replica in node_state.replicas:
                replica.allow(peers)

    def nodes(self) -> tuple[Node, ...]:
        """The nodes that stay, as they were measured before anything was started there."""
        return tuple(
            node_state.node
            for node_state in self.node_states.values()
            if node_state.state != "drained"
        )

    def later(self, work: Callable[[], Any]) -> Any:
        """Have something done by the worker; a future."""
        return self._worker.submit(work)

    @property
    def changing(self) -> bool:
        """Whether a change of plan is under way."""
        return self._steps is not None

    def follow(self, steps: Iterator[None]) -> None:
        """Go through these steps, one a tick.

        Raises:
            LaunchError: others are under way.
        """
        if self._steps is not None:
            raise LaunchError(
                "a change is under way already", hint="see turbofit cluster status, and wait"
            )
        self._steps = steps

    def widen(self) -> None:
        """Hold requests to no more than the plan and what serves under it ask for."""
        joined = [
            s.plan for s in self.node_states.values() if s.plan.plan and s.promised is self.plan
        ]
        self.bounds = bounds_of_cluster(replace(self.plan, nodes=(*self.plan.nodes, *joined)))

    def settle(self, node_state: NodeState, plan: NodePlan) -> None:
        """Start on a node what is planned for it, and give back the GPUs that it does not use."""
        gpu_ids: dict[int, str] = {}
        if plan.plan is not None:
            found = index_of(plan.plan.machine, self.places.on(node_state.node.id))
            gpu_ids = {index: one for one, index in found.items()}
            why = self._in_the_way(plan, gpu_ids)
            plan = replace(plan, plan=None, why_not=why) if why else plan
        node_state.plan, node_state.replicas = plan, []
        if plan.plan is None:
            self.places.drop(node_state.node.id)
            node_state.state, node_state.again_at = "unfit", time.monotonic() + _AGAIN_SECONDS
            self.say(f"node {node_state.node.name} does not serve: {node_state.why_not}")
            return
        node_state.state, node_state.again_at = "serving", float("inf")
        self.bounds = intersect(self.bounds, bounds_of_cluster(replace(self.plan, nodes=(plan,))))
        here = node_state.node.id == self.connection.here
        engine_specs = engine_specs_of(plan, self.plan, self.config, here=here, peers=self.peers)
        self.places.keep(node_state.node.id, [gpu_ids[index] for index in plan.gpus()])
        for engine_spec, member in zip(engine_specs, expected_members(plan), strict=True):
            place = self.places.place(
                node_state.node.id, gpu_ids[engine_spec.plan.parallel.groups[0][0]]
            )
            replica = Replica(
                engine_spec,
                place,
                share=member.share,
                host_bytes=member.host_bytes,
                start=start_agent,
            )
            node_state.replicas.append(replica)
            replica.begin()

    def _in_the_way(self, plan: NodePlan, gpu_ids: Mapping[int, str]) -> str:
        """Why a plan cannot be started on its node; empty where it can."""
        if not plan.gpus() <= gpu_ids.keys():
            return "other jobs of Ray have taken its GPUs"
        routing_table = self.routing_table()
        try:
            check_gateways(replace(routing_table, members=tuple(expected_members(plan))))
        except UsageError as exc:
            return exc.message
        return ""

    def measure(self, node_state: NodeState, known: NodePlan | None = None) -> Any:
        """Begin to measure a node and to plan for it; a future of its `NodePlan`.

        With a plan that is known, only to take its GPUs again.
        """
        plan, config = self.plan, self.config
        node_state.promised = plan
        alive = self.connection.watched().get(node_state.node.id)

        def work() -> NodePlan:
            if alive is None:
                return NodePlan(
                    node=node_state.node.id, name=node_state.node.name,
                    address=node_state.node.address, why_not="it left the cluster",
                )  # fmt: skip
            self.places.take([alive.id])
            if known is not None:
                return known
            (node_state.node,) = tell_nodes([alive], pretend=config.pretend)
            node_state.node = held_only(node_state.node, self.places.on(alive.id))
            return plan_joining(config.request, plan, node_state.node)

        return self.later(work)

    def stop(self, seconds: float, urgent: Callable[[], bool]) -> None:
        """End everything; nothing is left when it returns.

        Args:
            seconds: how long engines may take to end in order.
            urgent: whether there is no time, looked at again and again.
        """
        # What the worker waits for may take minutes, and ends with the connection.
        self._worker.shutdown(wait=False, cancel_futures=True)
        replicas = [
            replica for node_state in self.node_states.values() for replica in node_state.replicas
        ]
        deadline = time.monotonic() + seconds
        # Asked always: where Ray's head is gone, nothing else ends them.
        for replica in replicas:
            replica.stop(seconds)
        while not urgent() and time.monotonic() < deadline:
            if all(replica.ended() for replica in replicas):
                break
            time.sleep(0.05)
        for replica in replicas:
            replica.end()

        def give_back() -> None:
            for node in tuple(self.node_states):
                self.places.leave(node)

        # Without a head Ray does not return. What is not given back here ends with the connection.
        giving = threading.Thread(target=give_back, name="places", daemon=True)
        giving.start()
        giving.join(_GIVE_SECONDS)

    def _hear(self, seconds: float) -> None:
        """Wait for news of any engine, and take all that there is."""
        replicas = [
            replica for node_state in self.node_states.values() for replica in node_state.replicas
        ]
        waiting = [replica.news for replica in replicas if replica.news is not None]
        told: set[Any] = set()
        if waiting:
            told = ray_adapter.wait_any(waiting, seconds)
        else:
            time.sleep(seconds)
        for replica in replicas:
            before = replica.engine_state
            if (replica.news is None or replica.news in told) and replica.hear():
                self._tell(replica, before.state, before.said)

    def _tell(self, replica: Replica, state: str, said: str) -> None:
        """Report what is new of an engine."""
        now = replica.engine_state
        if now.said != said and now.said:
            self._say(f"{replica.engine_spec.name}: {now.said}")
        if now.state == state:
            return
        if now.state == "ready":
            self.say(f"{replica.engine_spec.name}: ready")
        elif now.state == "failed":
            self.say(f"{replica.engine_spec.name}: failed: {now.error.get('message', '')}")

    def _look(self, alive: Mapping[str, RayNode]) -> None:
        """Look for nodes that came, went, or are leaving."""
        for identity in [one for one in self.node_states if one not in alive]:
            node_state = self.node_states.pop(identity)
            self.say(f"node {node_state.node.name} is gone")
            for replica in node_state.replicas:
                replica.end()
            self.places.leave(identity)
        for node in alive.values():
            known = self.node_states.get(node.id)
            if known is None and node.gpus and not node.leaving:
                self.say(f"node {node.name} joined")
                node_state = NodeState(Node(id=node.id, name=node.name, address=node.address))
                self.node_states[node.id] = node_state
                node_state.work = self.measure(node_state)
            elif known is not None and node.leaving and known.state not in ("drained", "unfit"):
                self.drain(known)

    def drain(self, node_state: NodeState) -> None:
        """Let what a node has under way end, then stop its engines and give back its GPUs."""
        node_state.state, node_state.again_at = "drained", float("inf")
        self.say(f"node {node_state.node.name} is drained")
        self.empty(node_state)
        if not node_state.replicas:
            self.places.leave(node_state.node.id)

    def empty(self, node_state: NodeState) -> None:
        """Send nothing more to a node's engines."""
        for replica in node_state.replicas:
            replica.draining = True
            replica.drained_by = time.monotonic() + self.config.timing.drain
        number = self.routing_table().number
        for replica in node_state.replicas:
            replica.drained_in = number

    def idle(self, node_state: NodeState) -> bool:
        """Whether a draining node has nothing under way any more, or no more time.

        What a gateway told before it knew of the draining does not count.
        """
        now = time.monotonic()
        return all(
            now >= replica.drained_by
            or (
                self.followed >= replica.drained_in
                and not self.outstanding.get(replica.engine_spec.name, 0)
            )
            for replica in node_state.replicas
        )

    def _mind(self, node_state: NodeState, now: float) -> None:
        """Do what one node needs now."""
        if node_state.work is not None and node_state.work.done():
            work, node_state.work = node_state.work, None
            if node_state.state != "joining":
                return
            if node_state.promised is not self.plan:  # the plan has changed meanwhile
                node_state.work = self.measure(node_state)
                return
            self.settle(node_state, outcome(work, node_state))
        elif node_state.state == "drained" and node_state.replicas and self.idle(node_state):
            if self.closed(node_state):
                self.places.leave(node_state.node.id)
                self.say(
                    f"node {node_state.node.name}: its engines have ended, its GPUs are given back"
                )
        elif node_state.state == "unfit" and now >= node_state.again_at:
            node_state.state, node_state.again_at = "joining", float("inf")
            node_state.work = self.measure(node_state)
        elif (
            node_state.state == "serving"
            and node_state.failed
            and node_state.again_at > now + _AGAIN_SECONDS
        ):
            node_state.again_at = now + _AGAIN_SECONDS
        elif node_state.state == "serving" and node_state.failed and now >= node_state.again_at:
            node_state.again_at = float("inf")
            for replica in node_state.replicas:
                if replica.engine_state.state == "failed":
                    replica.end()
                    replica.actor_lost = False
                    replica.begin()

    def closed(self, node_state: NodeState) -> bool:
        """Stop a node's engines without waiting for them here; whether they have ended."""
        for replica in node_state.replicas:
            replica.stop(self.config.timing.drain)
        if not all(replica.ended() for replica in node_state.replicas):
            return False
        for replica in node_state.replicas:
            replica.end()
        node_state.replicas = []
        return True

    def _raise_if_nothing_serves(self) -> None:
        """End where nothing serves, nothing starts, and nothing is about to.

        Raises:
            TurbofitError: the first engine's failure.
        """
        if self._steps is not None or any(s.state == "joining" for s in self.node_states.values()):
            return
        replicas = [
            replica for node_state in self.node_states.values() for replica in node_state.replicas
        ]
        alive = any(
            replica.engine_state.state in ("starting", "ready") and not replica.actor_lost
            for replica in replicas
        )
        errors = [replica.engine_state.error for replica in replicas if replica.engine_state.error]
        if alive or not errors:
            self._hopeless = None
            return
        now = time.monotonic()
        self._hopeless = now if self._hopeless is None else self._hopeless
        if now - self._hopeless >= _SURE_SECONDS:
            raise error_from(errors[0])
