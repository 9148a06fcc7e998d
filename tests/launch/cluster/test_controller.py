"""Nodes that join, leave and change, as the controller sees them: no Ray, stand-in engines."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from tests.launch.cluster.test_promise import config, planned, request
from turbofit import api
from turbofit.core.cluster import Cluster, ClusterPlan, Node, NodePlan
from turbofit.core.errors import LaunchError
from turbofit.launch.cluster import controller as module
from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster import replica as replica_module
from turbofit.launch.cluster.change import changed
from turbofit.launch.cluster.connect import RayNode
from turbofit.launch.cluster.controller import Controller
from turbofit.launch.cluster.engine_spec import EngineSpec, EngineState
from turbofit.launch.cluster.node_state import NodeState
from turbofit.launch.cluster.replica import LAST_SECONDS, Replica
from turbofit.machine.spec import parse_spec
from turbofit.planning.cluster import plan_joining
from turbofit.planning.request import PlanRequest

SPEC = "1xrtx3090"


class Connection:
    """Nodes that come and go."""

    address, here, here_address = "10.0.0.1:6379", "ff", "10.0.0.1"

    def __init__(self) -> None:
        self.nodes: dict[str, RayNode] = {}

    def add(self, number: int) -> str:
        identity = f"{number:08x}"
        self.nodes[identity] = RayNode(id=identity, name=f"n{number}", address="10.0.0.7", gpus=1)
        return identity

    def watched(self) -> dict[str, RayNode]:
        return dict(self.nodes)


class Places:
    """One GPU a node."""

    def __init__(self) -> None:
        self.held: dict[str, dict[str, str]] = {}
        self.left: set[str] = set()

    def take(self, nodes: list[str]) -> None:
        self.held.update({node: {"0": node} for node in nodes if node not in self.left})

    def on(self, node: str) -> tuple[str, ...]:
        return tuple(self.held.get(node, ()))

    def place(self, node: str, gpu: str) -> str:
        return self.held[node][gpu]

    def keep(self, node: str, gpus: list[str]) -> None:
        self.held[node] = dict.fromkeys(gpus, node)

    def drop(self, node: str) -> None:
        self.held.pop(node, None)

    def leave(self, node: str) -> None:
        self.left.add(node)
        self.drop(node)


class Standin(Replica):
    """An engine that is ready at once, or fails."""

    fails: Callable[[EngineSpec], bool] = staticmethod(lambda _engine_spec: False)

    def begin(self) -> None:
        self._actor = self.engine_spec
        self.actor_lost = False
        self.engine_state = EngineState(
            state="ready", number=1, url=f"http://{self.engine_spec.name}"
        )
        if type(self).fails(self.engine_spec):
            self.engine_state = EngineState(
                state="failed", error={"message": "no luck", "exit_code": 5}
            )

    def hear(self) -> bool:
        return False

    def stop(self, seconds: float) -> None:
        self.engine_state = EngineState(state="ended", number=2)

    def ended(self) -> bool:
        return True

    def end(self) -> None:
        self.actor_lost = True


class World:
    """A controller of some nodes, and a worker whose work is done when it is told."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.connection, self.places = Connection(), Places()
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []
        monkeypatch.setattr(module, "Replica", Standin)
        monkeypatch.setattr(Standin, "fails", lambda _engine_spec: False)
        monkeypatch.setattr(module, "tell_nodes", _told)
        ids = [self.connection.add(number) for number in range(count)]
        self.places.take(ids)
        self.plan = planned(*[SPEC] * count, context=8192)
        nodes = _told(self.connection.nodes.values())
        self.controller = Controller(
            self.connection,  # type: ignore[arg-type]
            self.places,  # type: ignore[arg-type]
            self.plan,
            [NodeState(node) for node in nodes],
            config(context=8192),
            lambda _text: None,
            name="it",
        )
        monkeypatch.setattr(self.controller, "later", self._later)
        self.controller.begin()

    def _later(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, work))
        return future

    def work(self) -> None:
        """The worker does all that waits."""
        while self.waiting:
            future, work = self.waiting.pop(0)
            future.set_result(work())

    def tick(self, times: int = 1, *, work: bool = False) -> None:
        for _ in range(times):
            self.controller._looked = float("-inf")
            self.controller.followed = self.controller.routing_table().number
            self.controller.tick(0)
            if work:
                self.work()

    def target(self, **keywords: Any) -> ClusterPlan:
        """Another plan of the same nodes."""
        nodes = self.controller.nodes()
        return api.plan_cluster("internvl2-2b", Cluster(source="test", nodes=nodes), **keywords)

    def promises(self) -> list[int]:
        """What the engines that stand hold, node by node."""
        return [
            replica.engine_spec.plan.kv.longest_request_tokens
            for node_state in self.controller.node_states.values()
            for replica in node_state.replicas
        ]


def _told(nodes: Any, *, pretend: bool = False) -> tuple[Node, ...]:
    assert not pretend
    return tuple(
        Node(id=one.id, name=one.name, address=one.address, machine=parse_spec(SPEC))
        for one in nodes
    )


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], World]:
    """Makes one."""
    return lambda count: World(count, monkeypatch)


def test_a_node_that_joins_while_the_plan_changes_gets_the_new_one(
    world: Callable[[int], World],
) -> None:
    """What was planned for it under the old promise is too little for the new one."""
    here = world(1)
    late = here.connection.add(5)
    here.tick()
    assert here.controller.node_states[late].state == "joining"
    future, old = here.waiting.pop()
    future_plan = old()
    here.controller.follow(
        changed(here.controller, here.target(context=16384), request(context=16384))
    )
    here.tick(4, work=True)
    assert not here.controller.changing
    future.set_result(future_plan)  # the worker was slow
    here.tick(3, work=True)
    assert here.controller.node_states[late].state == "serving"
    assert here.controller.bounds.longest_request_tokens == 16384
    assert min(here.promises()) >= 16384


def test_a_node_that_joins_under_a_plan_that_is_given_up_goes_back_too(
    world: Callable[[int], World],
) -> None:
    """Its engines were planned for a promise that nobody makes any more."""
    here = world(2)
    target = here.target(context=4096)
    here.controller.follow(changed(here.controller, target, request(context=4096)))
    here.tick()
    late = here.connection.add(5)
    here.tick()
    assert here.controller.node_states[late].promised is target
    Standin.fails = lambda engine_spec: (
        engine_spec.name.startswith("n1-") and engine_spec.plan.kv.longest_request_tokens < 8192
    )
    here.tick(20, work=True)
    assert here.controller.change == "given up: no luck"
    assert here.controller.bounds.longest_request_tokens == 8192
    assert len(here.promises()) == 3
    assert min(here.promises()) >= 8192


def test_a_change_goes_back_where_a_node_that_should_serve_does_not(
    world: Callable[[int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would empty one node after the other."""
    here = world(2)
    target = here.target(context=16384)

    def none(_request: PlanRequest, _plan: ClusterPlan, node: Node) -> NodePlan:
        return NodePlan(node=node.id, name=node.name, address=node.address, why_not="too full")

    monkeypatch.setattr(module, "plan_joining", none)
    here.controller.follow(changed(here.controller, target, request(context=16384)))
    here.tick(20, work=True)
    assert "too full" in here.controller.change
    assert [node_state.state for node_state in here.controller.node_states.values()] == [
        "serving"
    ] * 2
    assert here.controller.bounds.longest_request_tokens == 8192


@pytest.mark.parametrize("ticks", [1, 2, 3])
def test_a_node_that_is_drained_within_a_change_stays_drained(
    world: Callable[[int], World], ticks: int
) -> None:
    """However far it had come; its GPU is given back."""
    here = world(2)
    here.controller.follow(
        changed(here.controller, here.target(context=16384), request(context=16384))
    )
    here.tick(ticks)
    here.controller.drain(here.controller.node_states["00000000"])
    here.tick(10, work=True)
    assert not here.controller.changing
    assert here.controller.node_states["00000000"].state == "drained"
    assert not here.controller.node_states["00000000"].replicas
    assert here.places.on("00000000") == ()
    assert here.controller.node_states["00000001"].state == "serving"
    assert min(here.promises()) >= 16384


def test_a_node_that_leaves_while_it_joins_holds_nothing(world: Callable[[int], World]) -> None:
    """Neither drained nor dead: the worker takes its GPUs afterwards."""
    here = world(1)
    drained, dead = here.connection.add(5), here.connection.add(6)
    here.tick()
    here.controller.drain(here.controller.node_states[drained])
    del here.connection.nodes[dead]
    here.tick()
    here.work()
    here.tick()
    assert here.controller.node_states[drained].state == "drained"
    assert dead not in here.controller.node_states
    assert here.places.on(drained) == here.places.on(dead) == ()


def test_a_cluster_waits_for_its_only_node_and_not_for_its_only_engine(
    world: Callable[[int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray tells of a dead node's actors first; it may come back. An engine that fails will not."""
    here = world(1)
    (replica,) = here.controller.node_states["00000000"].replicas
    replica.engine_state = EngineState(state="failed", error={"message": "no luck", "exit_code": 5})
    here.tick()
    here.connection.nodes.clear()
    here.tick()
    assert not here.controller.node_states
    again = here.connection.add(7)
    here.tick(3, work=True)
    assert here.controller.node_states[again].state == "serving"
    (replica,) = here.controller.node_states[again].replicas
    replica.engine_state = EngineState(state="failed", error={"message": "no luck", "exit_code": 5})
    monkeypatch.setattr(module, "_SURE_SECONDS", 0.0)
    with pytest.raises(LaunchError, match="no luck"):
        here.tick()


def test_what_a_node_that_joins_asks_for_holds_for_all(
    world: Callable[[int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request may go to any node, so that each is held to the one which takes the least."""
    here = world(1)
    least = here.controller.bounds.limits.bytes_per_body - 1

    def narrower(request: PlanRequest, plan: ClusterPlan, node: Node) -> NodePlan:
        made = plan_joining(request, plan, node)
        assert made.plan is not None
        limits = replace(made.plan.limits, bytes_per_body=least)
        return replace(made, plan=replace(made.plan, limits=limits))

    monkeypatch.setattr(module, "plan_joining", narrower)
    here.connection.add(5)
    here.tick(3, work=True)
    assert len(here.promises()) == 2
    assert here.controller.bounds.limits.bytes_per_body == least


def test_stopping_waits_for_no_measurement(world: Callable[[int], World]) -> None:
    """A node that does not answer is waited for two minutes; a stop is not."""
    from threading import Event

    here = world(1)
    hold = Event()
    measuring = here.controller._worker.submit(hold.wait)
    here.controller.stop(1, lambda: False)
    assert not measuring.done()
    hold.set()


def test_a_drain_and_a_change_end_where_actors_do_not_answer(
    world: Callable[[int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is stopped, or stuck in the driver, is alive for Ray; it is killed."""
    here, now, killed = world(2), [0.0], list[Any]()
    monkeypatch.setattr(replica_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(ray_adapter, "wait_all", lambda _refs, _seconds: set())
    monkeypatch.setattr(ray_adapter, "kill_actor", killed.append)
    for name in ("stop", "ended", "end"):
        monkeypatch.setattr(Standin, name, getattr(Replica, name))
    stuck = SimpleNamespace(stop=SimpleNamespace(remote=lambda _seconds: "no answer"))
    drained, changing = here.controller.node_states.values()
    for node_state in (drained, changing):
        node_state.replicas[0]._actor = stuck
    seconds = here.controller.config.timing.drain + LAST_SECONDS
    here.controller.drain(drained)
    here.controller.follow(
        changed(here.controller, here.target(context=16384), request(context=16384))
    )
    here.tick(3)
    now[0] = seconds - 0.1
    here.tick(3)
    assert here.places.on(drained.node.id)
    assert here.controller.changing
    assert not killed
    now[0] = seconds
    here.tick(5, work=True)
    assert here.places.on(drained.node.id) == ()
    assert not here.controller.changing
    assert killed == [stuck, stuck]
    assert min(here.promises()) >= 16384


def test_an_actors_next_process_is_told_of_gateways_that_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its order knows only those that were there when it was made."""
    told: list[Any] = []

    class Remote:
        def __init__(self, name: str) -> None:
            self.name = name

        def remote(self, *args: Any) -> Any:
            told.append((self.name, *args))
            return EngineState(number=len(told), pid=pids[0])

    class Actor:
        def __getattr__(self, name: str) -> Remote:
            return Remote(name)

    pids = [1]
    monkeypatch.setattr(ray_adapter, "result", lambda ref, _seconds: ref)
    replica = Replica(_engine_spec(), None, share=1.0, host_bytes=0, start=lambda *_: Actor())
    replica.begin()
    replica.hear()
    assert not [one for one in told if one[0] == "allow"]
    replica.allow(("10.0.0.9", "10.0.0.8"))
    pids[0] = 2
    replica.hear()
    replica.hear()
    assert [one for one in told if one[0] == "allow"] == [("allow", ("10.0.0.9", "10.0.0.8"))] * 2


def _engine_spec() -> EngineSpec:
    from turbofit.launch.cluster.promise import engine_specs_of

    plan = planned(SPEC)
    return engine_specs_of(plan.nodes[0], plan, config(), here=False, peers=("10.0.0.9",))[0]
