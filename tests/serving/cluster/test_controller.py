"""The controller of nodes whose actors are plain objects, in a cluster without Ray."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from tests.fixtures.clusters import node
from turbofit.core.cluster import Node, NodePlan, NodeStatus
from turbofit.core.errors import DoesNotFitError, LaunchError
from turbofit.gateway.config import GatewayConfig
from turbofit.planning.request import PlanRequest
from turbofit.serving.cluster import actors
from turbofit.serving.cluster import controller as module
from turbofit.serving.cluster.controller import Controller, serve_cluster
from turbofit.serving.cluster.node import DRAINED
from turbofit.serving.options import ClusterServeConfig

RUN = "mine"


class Method:
    """A method of an actor, whose result is there at once."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.remote = function


class Actor:
    """A node's actor: its server opens at once, unless ``fails`` says why it does not."""

    def __init__(self, world: World, planned: NodePlan, claim: str, gpus: int) -> None:
        self.world, self.planned, self.claim, self.gpus = world, planned, claim, gpus
        self.get_status, self.end = Method(lambda: self.status), Method(self._end)
        self.keep_alive = Method(self._keep)
        self.taken_over: Any = Method(lambda claim: planned if claim == self.claim else None)
        why = world.fails.get(planned.name, planned.why_not)
        serves = planned.plan is not None and not why
        state = "serving" if serves else "drained" if why == DRAINED else "unfit"
        self.status = NodeStatus(
            serves=RUN, id=planned.node, name=planned.name, address="", why_not=why,
            state=state,  # type: ignore[arg-type]
            at_once=8 if planned.plan is not None else 0, url="http://x" if serves else "",
        )  # fmt: skip

    def _keep(self) -> NodeStatus:
        self.world.kept[self.planned.name] = self.world.now
        return self.status

    def _end(self) -> None:
        self.world.log.append(f"end {self.planned.name}")
        self.status = replace(self.status, state="drained", url="")


class World:
    """A cluster in the place of `ray_adapter`, with nodes that come and go, and its time."""

    def __init__(self) -> None:
        self.machines: dict[str, Node] = {}
        self.alive: dict[str, Node] = {}
        self.named: dict[str, Actor] = {}
        self.fails: dict[str, str] = {}
        #: When a controller asked the actor of a node; the names that controllers hold.
        self.kept: dict[str, float] = {}
        self.held: set[str] = set()
        self.log: list[str] = []
        self.said: list[str] = []
        self.now, self.stop = 1000.0, SimpleNamespace(signal=None, urgent=False)

    def time(self) -> float:
        return self.now

    monotonic = time

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def connected(self, _: str | None) -> Any:
        return nullcontext("10.0.0.1:6379")

    def actors(self) -> dict[str, Actor]:
        return dict(self.named)

    def nodes(self, _: str) -> dict[str, Node]:
        """Each with what its actor holds."""
        held = {actor.planned.node: actor.gpus for actor in self.named.values()}
        why = "jobs of Ray hold its GPUs"
        return {
            key: replace(one, why_not=one.why_not or why * bool(held.get(key)))
            for key, one in self.alive.items()
        }

    def run_on(self, node: str, _task: Callable[..., Node], _version: str) -> Node:
        self.log.append(f"measure {self.machines[node].name}")
        return self.machines[node]

    def outcomes(self, answers: Sequence[Any], _: float) -> list[Any]:
        return list(answers)

    def start_actor(self, _: type, *args: Any, node: str, gpus: int, name: str) -> Actor:
        run, planned, _words, _key, claim = args
        assert name.startswith(f"{run}/{node}/")
        self.log.append(f"start {planned.name} {gpus}")
        self.named[name] = Actor(self, planned, claim, gpus)
        return self.named[name]

    def kill_actor(self, actor: Actor) -> None:
        self.log.append(f"kill {actor.planned.name}")
        self.named = {name: one for name, one in self.named.items() if one is not actor}

    def held_name(self, name: str) -> object | None:
        if name in self.held:
            return None
        self.held.add(name)
        return object()

    def add(self, number: int, spec: str) -> str:
        found = node(number, spec)
        self.machines[found.id] = found
        assert found.machine is not None
        self.alive[found.id] = replace(found, machine=None, gpus=len(found.machine.gpus))
        return found.id

    def controller(self, words: tuple[str, ...] = (), **asked: Any) -> Controller:
        """One after its first looks."""
        request = PlanRequest(model="internvl2-1b", **asked)
        config = ClusterServeConfig(
            request=request, gateway=GatewayConfig(), name=RUN, node_words=words
        )
        stop: Any = self.stop
        made = Controller("10.0.0.1:6379", config, stop, self.said.append)
        made.take_over()
        ticks(made)
        return made

    def serving(self, *specs: str) -> Controller:
        """The controller of nodes with these machines, numbered from 1."""
        for number, spec in enumerate(specs, 1):
            self.add(number, spec)
        return self.controller()

    @property
    def states(self) -> dict[str, str]:
        return {one.planned.name: one.status.state for one in self.named.values()}

    def actor(self, name: str) -> Actor:
        return next(one for one in self.named.values() if one.planned.name == name)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(module, "ray_adapter", made)
    monkeypatch.setattr(actors, "ray_adapter", made)
    monkeypatch.setattr(module, "time", made)
    return made


def ticks(made: Controller, count: int = 3) -> None:
    for _ in range(count):
        made.tick()


def test_nodes_serve_and_one_that_does_not_keep_the_promise_says_why(world: World) -> None:
    world.serving("2xrtx3090", "1xt4:free=1GiB")
    assert world.states == {"host-1": "serving", "host-2": "unfit"}
    assert "runs out of memory" in world.actor("host-2").status.why_not
    started = [line for line in world.log if line.startswith("start")]
    assert started == ["start host-1 2", "start host-2 0"]
    assert world.said[0].startswith("fits: InternVL2-1B on 1 of 2 nodes")
    assert "\nwarning: 1 node left out: runs out" in world.said[0]
    assert "node host-1: serving http://x" in world.said


def test_a_node_that_joins_serves_under_the_promise_and_one_that_leaves_is_forgotten(
    world: World,
) -> None:
    made = world.serving("1xl4")
    promise = made.plan
    late = world.add(2, "2xrtx3090")
    world.log.clear()
    ticks(made)
    assert world.log == ["measure host-2", "start host-2 2"]
    assert made.plan is promise
    assert promise is not None
    joined = world.actor("host-2").planned.plan
    assert joined is not None
    assert joined.promise.limits.n == promise.plans[0].promise.limits.n
    del world.alive[late]
    ticks(made, 1)
    assert list(made.nodes) == ["0001"]
    assert world.said[-1] == "node host-2 has left the cluster"


def test_an_unfit_node_is_tried_again_after_a_while(world: World) -> None:
    """Its actor changes only where something has changed."""
    world.add(1, "1xl4")
    world.alive["0001"] = replace(world.alive["0001"], why_not="jobs of Ray hold 1 of its 1 GPUs")
    world.add(2, "1xl4")
    made = world.controller()
    world.log.clear()
    world.now += 15
    ticks(made)
    assert world.log == []
    world.alive["0001"] = replace(world.alive["0001"], why_not="")
    ticks(made)
    assert world.log == []  # the next try
    world.now += 15
    ticks(made)
    assert world.log == ["measure host-1", "kill host-1", "start host-1 1"]
    assert world.states == {"host-1": "serving", "host-2": "serving"}


@pytest.mark.parametrize("taken_over", [False, True])
def test_the_newest_actor_of_a_node_is_found_after_the_clock_was_set_back(
    world: World, monkeypatch: pytest.MonkeyPatch, taken_over: bool
) -> None:
    """Ray lists an ended actor for a while; by the wall clock its name was the newest."""
    world.add(1, "1xl4")
    world.alive["0001"] = replace(world.alive["0001"], why_not="jobs of Ray hold 1 of its 1 GPUs")
    world.add(2, "1xl4")
    made = world.controller()
    if taken_over:
        made = world.controller()
    monkeypatch.setattr(world, "time", lambda: world.now - 5000)
    monkeypatch.setattr(world, "kill_actor", lambda _: None)
    world.alive["0001"] = replace(world.alive["0001"], why_not="")
    world.now += 15
    ticks(made)
    assert len(world.named) == 3
    assert actors.node_actors(RUN)["0001"].gpus == 1


def test_a_node_whose_actor_has_gone_joins_again(world: World) -> None:
    made = world.serving("1xl4")
    world.named.clear()
    world.now += 15
    ticks(made)
    assert world.states == {"host-1": "serving"}


def test_a_silent_actor_is_left_alone(world: World) -> None:
    """It starts again, or waits for GPUs."""
    made = world.serving("1xl4")
    world.actor("host-1").keep_alive = Method(TimeoutError)
    world.log.clear()
    world.now += 100
    ticks(made)
    assert world.log == []


@pytest.mark.parametrize("by_ray", [False, True])
def test_a_drained_node_gives_its_gpus_back_and_stays_empty(world: World, by_ray: bool) -> None:
    made = world.serving("1xl4", "1xl4")
    world.log.clear()
    if by_ray:
        world.alive["0002"] = replace(world.alive["0002"], leaving=True)
    else:
        world.actor("host-2").end.remote()
    ticks(made)
    told = list(dict.fromkeys(world.log))  # it is told at each look, while it leaves
    assert told[:3] == ["end host-2", "kill host-2", "start host-2 0"]
    world.now += 1000
    ticks(made)
    assert world.states == {"host-1": "serving", "host-2": "drained"}
    assert not [line for line in world.log if line.startswith("measure")]


def test_a_controller_takes_over_what_a_killed_one_left(world: World) -> None:
    """Of the same request; a node that joined, and one that is drained, stay as they are."""
    first = world.serving("1xl4", "1xl4")
    world.add(3, "2xrtx3090")  # alone it would promise more
    ticks(first)
    world.actor("host-2").end.remote()
    ticks(first)
    before = dict(world.named)
    world.log.clear()
    world.said.clear()
    made = world.controller()
    assert (world.log, world.named) == ([], before)
    assert world.states == {"host-1": "serving", "host-2": "drained", "host-3": "serving"}
    assert world.said[0] == "taken over from an earlier controller, with its promise: 2 nodes"
    assert first.plan is not None
    assert made.plan is not None
    assert made.plan.promise.limits == first.plan.promise.limits
    assert made.plan.promise.context == first.plan.promise.context
    world.add(4, "1xl4")
    ticks(made)
    joined = world.actor("host-4").planned.plan
    assert joined is not None
    assert joined.promise.image_limit == first.plan.plans[0].promise.image_limit
    assert joined.promise.context == first.plan.promise.context


@pytest.mark.parametrize("other", [{"context": 8192}, {"words": ("--drain", "60")}])
def test_what_another_request_left_is_ended_before_the_plan(
    world: World, other: dict[str, Any]
) -> None:
    world.serving("1xl4", "1xt4:free=1GiB")  # it serves nothing, and its actor says so
    world.log.clear()
    world.controller(**other)
    assert world.log[:4] == ["end host-1", "end host-2", "kill host-1", "kill host-2"]
    assert world.log[4:6] == ["measure host-1", "measure host-2"]
    assert world.states == {"host-1": "serving", "host-2": "unfit"}


def test_gpus_that_ray_frees_late_are_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add(1, "1xl4")
    world.alive["head"] = Node(id="head", name="head", address="", why_not="Ray counts no GPU")
    world.controller()
    freed = world.now + 3

    def nodes(_: str) -> dict[str, Node]:
        why = "jobs of Ray hold its GPUs" * (world.now < freed)
        return {key: replace(one, why_not=one.why_not or why) for key, one in world.alive.items()}

    monkeypatch.setattr(world, "nodes", nodes)
    world.controller(context=8192)
    assert world.states["host-1"] == "serving"
    assert freed <= world.now < freed + 1


def test_what_does_not_answer_a_new_controller_is_ended(world: World) -> None:
    world.serving("1xl4", "1xl4")
    world.actor("host-2").taken_over = Method(lambda _: TimeoutError())
    world.log.clear()
    made = world.controller()
    assert world.log == ["end host-2", "kill host-2", "measure host-2", "start host-2 1"]
    assert set(made.nodes) == {"0001", "0002"}


def test_actors_hear_of_their_controller_at_each_look(world: World) -> None:
    made = world.serving("1xl4")
    world.now += 100
    ticks(made, 1)
    assert world.kept == {"host-1": world.now}


def test_the_end_waits_for_servers_and_kills_all_actors(world: World) -> None:
    made = world.serving("1xl4", "1xt4:free=1GiB")
    actor, waits = world.actor("host-1"), [5]

    def late_status() -> NodeStatus:
        waits[0] -= 1
        return replace(actor.status, state="draining" if waits[0] else "drained")

    actor.get_status = actor.keep_alive = Method(late_status)
    world.log.clear()
    made.end()
    assert (waits, world.log) == ([0], ["end host-1", "end host-2", "kill host-1", "kill host-2"])


def test_an_urgent_end_still_lets_the_actors_pass_it_on(world: World) -> None:
    made = world.serving("1xl4")
    world.stop.urgent = True
    world.log.clear()
    made.end()
    assert world.log == ["end host-1", "kill host-1"]


class Front:
    """A front in a thread: ``open`` once a node serves."""

    def __init__(self, world: World, source: Any) -> None:
        self.world, self.source, self.url, self.alive = world, source, "http://front", True

    def start(self) -> None:
        self.world.log.append("front")

    def call(self, ask: Callable[[Any], Any]) -> Any:
        states = self.world.states.values()
        return ask(SimpleNamespace(fleet=SimpleNamespace(open="serving" in states)))

    def cut_off(self) -> None: ...

    def stop(self, *, drain: bool) -> None:
        self.world.log.append("front drains" if drain else "front is cut off")


@pytest.fixture
def serve(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`serve_cluster` without a front's sockets; it gets SIGTERM once it is open."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "Front", lambda source, *_: source)
    monkeypatch.setattr(module, "GatewayThread", lambda source: Front(world, source))
    world.stop.rearm = lambda: None
    world.stop.on_second = lambda _: None

    def serve(model: str = "internvl2-1b") -> signal.Signals:
        def opened(urls: list[str]) -> None:
            assert urls == ["http://front"]
            world.stop.signal = signal.SIGTERM

        request = PlanRequest(model=model)
        config = ClusterServeConfig(request=request, gateway=GatewayConfig(), name=RUN)
        stop: Any = world.stop
        return serve_cluster(config, stop, say=world.said.append, on_open=opened)

    return serve


def test_it_opens_once_a_node_serves_and_leaves_nothing(world: World, serve: Any) -> None:
    world.add(1, "1xl4")
    assert serve() == signal.SIGTERM
    assert world.log == [
        "front", "measure host-1", "start host-1 1", "front drains", "end host-1", "kill host-1",
    ]  # fmt: skip
    assert world.named == {}
    assert "draining: running requests may end" in world.said


def test_it_takes_over_at_its_start_and_leaves_nothing(world: World, serve: Any) -> None:
    world.serving("1xl4")
    world.log.clear()
    assert serve() == signal.SIGTERM
    assert (world.log, world.named) == (["front", "front drains", "end host-1", "kill host-1"], {})


def test_two_controllers_do_not_serve_the_same(world: World, serve: Any) -> None:
    world.serving("1xl4")
    world.held.add(RUN)
    world.log.clear()
    with pytest.raises(LaunchError, match="is served on this cluster already"):
        serve()
    assert world.log == []


def test_without_a_node_that_fits_it_says_what_would(world: World, serve: Any) -> None:
    world.add(1, "1xrtx2080ti")
    with pytest.raises(DoesNotFitError, match="on none of 1 node") as caught:
        serve("internvl2-8b")
    assert "AWQ" in caught.value.hint
    assert world.stop.abrupt


def test_where_no_node_serves_from_the_beginning_it_ends(world: World, serve: Any) -> None:
    world.add(1, "1xl4")
    world.fails["host-1"] = "the weights are not there"
    with pytest.raises(LaunchError, match="no node serves"):
        serve()
    assert "node host-1: unfit the weights are not there" in world.said
    assert world.named == {}


def test_an_address_stays_while_its_actor_is_silent(world: World) -> None:
    class Told:
        def __init__(self, answer: Any) -> None:
            self.address = Method(lambda: answer)

    address = actors.NodeAddress(name="a", url="http://a", key="k")
    closed = actors.NodeAddress(name="b", url="", key="k")
    told: Any = {f"{RUN}/a/1": Told(address), f"{RUN}/b/1": Told(closed), "another/a/1": Told(None)}
    world.named = told
    find = actors.address_source(RUN)
    assert find() == [address]
    told[f"{RUN}/a/1"] = Told(TimeoutError())
    assert find() == [address]
    told[f"{RUN}/a/2"] = Told(replace(address, url="http://newer"))
    assert [one.url for one in find()] == ["http://newer"]
    for name in [name for name in told if name.startswith(f"{RUN}/a")]:
        del told[name]
    assert find() == []
