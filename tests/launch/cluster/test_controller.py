"""The loop over nodes, with actors that are plain objects and a Ray that is none."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from tests.fixtures.clusters import node
from turbofit.core.cluster import ClusterPlan, Node
from turbofit.core.errors import DoesNotFitError
from turbofit.gateway.config import GatewayConfig
from turbofit.launch.cluster import controller as module
from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster.controller import Controller
from turbofit.launch.cluster.node import NodeReport
from turbofit.launch.cluster.nodes import held_only
from turbofit.launch.serve.config import ClusterServeConfig
from turbofit.planning.request import PlanRequest


class Method:
    """A method of an actor, whose result is there at once."""

    def __init__(self, function: Any) -> None:
        self.remote = function


class Actor:
    """A node's actor: it opens what it is told to serve, unless ``fails`` says why not."""

    def __init__(self, world: World, spec: str, gpus: int) -> None:
        self.world, self.spec, self.gpus = world, spec, gpus
        self.tell, self.serve = Method(lambda: self.told), Method(self._serve)
        self.end = Method(self._end)
        self._idle()

    def _idle(self) -> None:
        measured = held_only(self.world.specs[self.spec], map(str, range(self.gpus)))
        self.told = NodeReport(key="k", measured=measured)

    def _serve(self, digest: str, plan: str, words: tuple[str, ...]) -> None:
        self.world.log.append(
            f"serve {self.spec} {msgspec.json.decode(plan)['settings']['session_len']}"
        )
        why, code = self.world.fails.get(self.spec, ("", 0))
        state = "unfit" if why else "open"
        self.told = NodeReport(
            state=state, digest=digest, url=f"http://{self.spec}:{len(self.world.log)}", key="k",
            why=why, exit_code=code,
        )  # fmt: skip

    def _end(self) -> None:
        if self.told.digest:
            self.world.log.append(f"end {self.spec}")
        self._idle()


class World:
    """Nodes that come and go."""

    address, here = "ray:1", "head"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.specs: dict[str, Any] = {}
        self.alive: dict[str, Node] = {}
        self.log: list[str] = []
        self.said: list[str] = []
        self.questions: dict[int, Any] = {}
        self.fails: dict[str, tuple[str, int]] = {}
        self.now = 1000.0
        monkeypatch.setattr(
            ray_adapter, "kill_actor", lambda actor: self.log.append(f"free {actor.spec}")
        )
        monkeypatch.setattr(ray_adapter, "start_actor", self._start_actor)
        monkeypatch.setattr(ray_adapter, "outcome", lambda ref, _: ref)
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module.time, "sleep", lambda _: None)
        monkeypatch.setattr(module, "_FRONTS_SECONDS", 0.0)

    def _start_actor(self, *_: Any, node: str, gpus: int, **__: Any) -> Actor:
        return Actor(self, self.alive[node].name, gpus)

    def watched(self) -> dict[str, Node]:
        return dict(self.alive)

    def add(self, number: int, spec: str) -> str:
        found = node(number, spec)
        self.specs[found.name] = found
        gpus = len(found.machine.gpus)
        self.alive[found.id] = replace(found, machine=None, gpus=gpus, free=gpus)
        return found.id

    def controller(self, **asked: Any) -> Controller:
        config = ClusterServeConfig(request=PlanRequest(model="internvl2-8b", **asked))
        made = Controller(self, config, Stop(), lambda _: None)  # type: ignore[arg-type]
        made.has_front = lambda _: True  # type: ignore[method-assign]
        made.begin()
        return made

    def resumed(self, first: Controller) -> Controller:
        """The next controller, which goes on with what the first one has written down."""
        first.front = SimpleNamespace(url="", call=lambda status: status(SimpleNamespace(nodes={})))
        first.post(SimpleNamespace(post=Method(lambda *_: {})))
        made = Controller(self, first.config, Stop(), lambda _: None)  # type: ignore[arg-type]
        made.has_front = lambda _: True  # type: ignore[method-assign]
        assert made.resume()
        return made


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return World(monkeypatch)


def states(made: Controller) -> dict[str, str]:
    return {one.ray.name: one.state for one in made.nodes.values()}


def ticks(made: Controller, count: int = 6) -> None:
    for _ in range(count):
        made.tick()


def serving(world: World, *specs: str, **asked: Any) -> Controller:
    """A controller of nodes with these cards, after its first looks."""
    for number, spec in enumerate(specs or ("2xrtx3090", "2xrtx3090"), 1):
        world.add(number, spec)
    made = world.controller(**asked)
    ticks(made)
    return made


def target(made: Controller, **changes: Any) -> None:
    told = made.answer({"kind": "change", "keywords": changes})
    assert "said" in told, told


def test_nodes_serve_and_one_that_does_not_keep_the_promise_says_why(world: World) -> None:
    made = serving(world, "2xrtx3090", "1xt4")
    assert states(made) == {"host-1": "serving", "host-2": "unfit"}
    assert "runs out of memory" in made.nodes["0002"].why
    assert "free host-2" in world.log
    (address,) = made.addresses()
    assert (address.key, address.draining) == ("k", False)
    assert made.hopeless == ""


def test_cards_that_the_plan_leaves_go_back(world: World) -> None:
    made = serving(world, "4xrtx3090", replicas=1, tp=2)
    assert states(made) == {"host-1": "serving"}
    assert made.nodes["0001"].gpus == 2
    assert world.log == ["free host-1", "serve host-1 32768"]


def test_a_node_that_joins_is_planned_under_the_promise_and_one_that_leaves_is_gone(
    world: World,
) -> None:
    made = serving(world, "2xrtx3090")
    promise = made.plan
    late = world.add(2, "2xrtx3090")
    ticks(made)
    assert states(made) == {"host-1": "serving", "host-2": "serving"}
    assert made.plan is promise
    del world.alive[late]
    ticks(made, 1)
    assert states(made) == {"host-1": "serving"}


def test_an_unfit_node_is_tried_again_after_ten_minutes(world: World) -> None:
    world.fails["host-2"] = ("the weights are not there", 5)
    made = serving(world)
    assert states(made) == {"host-1": "serving", "host-2": "unfit"}
    assert made.nodes["0002"].why == "the weights are not there"
    world.fails.clear()
    world.now += 599
    ticks(made)
    assert states(made)["host-2"] == "unfit"
    world.now += 2
    ticks(made)
    assert states(made)["host-2"] == "serving"


def test_a_node_that_ran_out_of_memory_is_planned_with_a_larger_margin_once(world: World) -> None:
    world.fails["host-1"] = ("out of memory", 6)
    world.add(1, "2xrtx3090")
    made = world.controller()
    ticks(made, 1)
    node_state = made.nodes["0001"]
    first = node_state.plan
    ticks(made)
    assert node_state.plan.plan.gpus[0].margin == 2 * first.plan.gpus[0].margin
    ticks(made)
    assert node_state.state == "unfit"
    assert made.hopeless == "out of memory"
    assert len([line for line in world.log if line.startswith("serve")]) == 2


def test_a_node_whose_server_was_killed_joins_again(world: World) -> None:
    made = serving(world, "2xrtx3090")
    (node_state,) = made.nodes.values()
    killed = {"state": "unfit", "why": "killed", "exit_code": 0}
    node_state.actor.told = replace(node_state.report, **killed)
    world.log.clear()
    ticks(made)
    assert states(made) == {"host-1": "draining"}
    told = made.answer({"kind": "change", "keywords": {"context": 16384}})
    assert "a node comes back" in told["error"]["message"]
    world.now += 5
    ticks(made)
    assert states(made) == {"host-1": "serving"}
    assert world.log == ["end host-1", "serve host-1 32768"]
    node_state.actor.told = replace(node_state.report, **killed)
    ticks(made)
    assert states(made) == {"host-1": "unfit"}  # once in ten minutes


def test_a_drain_ends_the_server_then_gives_the_cards_back(world: World) -> None:
    made = serving(world)
    world.log.clear()
    assert "finishes what it has" in made.answer({"kind": "drain", "node": "host-2"})["said"]
    assert [one.draining for one in made.addresses()] == [False, True]
    ticks(made)
    assert states(made) == {"host-1": "serving", "host-2": "drained"}
    assert world.log == ["end host-2", "free host-2"]
    world.now += 10_000
    ticks(made)
    assert states(made)["host-2"] == "drained"  # until it leaves and joins again
    world.alive["0001"] = replace(world.alive["0001"], leaving=True)  # Ray drains it
    ticks(made)
    assert states(made)["host-1"] == "drained"


def test_a_node_that_is_drained_while_it_joins_is_not_heard_as_a_server(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = serving(world, "2xrtx3090")
    world.add(2, "2xrtx3090")
    outcome = ray_adapter.outcome
    monkeypatch.setattr(ray_adapter, "outcome", lambda one, s: outcome(one, s) if one.url else None)
    made.tick()
    assert states(made)["host-2"] == "joining"
    made.answer({"kind": "drain", "node": "host-2"})
    monkeypatch.setattr(ray_adapter, "outcome", outcome)
    ticks(made)
    assert states(made) == {"host-1": "serving", "host-2": "drained"}


def test_a_silent_actor_has_one_question_to_answer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, asked = serving(world, "2xrtx3090"), []
    made.nodes["0001"].actor.tell = Method(lambda: asked.append("tell") or "asked")
    monkeypatch.setattr(ray_adapter, "outcome", lambda *_: None)
    ticks(made)
    assert asked == ["tell"]


def test_an_urgent_end_still_lets_the_actors_pass_it_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = serving(world, "2xrtx3090")
    (actor,) = (one.actor for one in made.nodes.values())
    actor.end = Method(lambda: "passed on")  # its server takes long
    monkeypatch.setattr(ray_adapter, "outcome", lambda call, _: world.log.append(call))
    world.log.clear()
    made._stop.urgent = True
    made.end()
    assert world.log == ["passed on", "free host-1"]


def test_the_end_does_not_wait_for_a_node_that_has_died(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = serving(world, "2xrtx3090")
    monkeypatch.setattr(ray_adapter, "outcome", lambda *_: ray_adapter.RayCallError("it died"))
    monkeypatch.setattr(module.time, "sleep", lambda _: setattr(world, "now", world.now + 1))
    began = world.now
    made.end()
    assert world.now - began < 15


def test_the_next_controller_serves_on_and_leaves_a_drained_node_empty(world: World) -> None:
    first = serving(world)
    first.answer({"kind": "drain", "node": "host-2"})
    ticks(first)
    made = world.resumed(first)
    ticks(made)
    assert states(made) == {"host-1": "serving", "host-2": "drained"}


def test_the_next_controller_goes_on_with_a_change(world: World) -> None:
    first = serving(world)
    target(first, context=16384)
    while "serve host-1 16384" not in world.log:
        first.tick()
    made = world.resumed(first)
    world.log.clear()
    ticks(made, 10)
    assert world.log == ["end host-2", "serve host-2 16384"]
    assert set(states(made).values()) == {"serving"}


def test_an_actor_that_has_just_begun_does_not_say_that_its_server_has_ended(world: World) -> None:
    made = serving(world, "2xrtx3090")
    (node_state,) = made.nodes.values()
    node_state.actor.told = NodeReport(state="", key="k")
    made.tick()
    assert [one.url for one in made.addresses()] == [node_state.report.url]


def test_what_is_said_of_an_earlier_plan_is_no_failure_of_this_one(world: World) -> None:
    made = serving(world, "2xrtx3090")
    (node_state,) = made.nodes.values()
    node_state.report = NodeReport(state="unfit", digest="an earlier one", why="it failed")
    assert node_state.failed == ""
    node_state.report = replace(node_state.report, digest=node_state.digest)
    assert node_state.failed == "it failed"


def test_a_change_goes_node_by_node_each_out_of_the_front_first(world: World) -> None:
    made = serving(world)
    world.log.clear()
    target(made, context=16384)
    made.tick()
    assert [one.draining for one in made.addresses()] == [True, False]
    assert made.change == "0 of 2 nodes have the new plan"
    ticks(made, 10)
    assert world.log == [
        "end host-1", "serve host-1 16384", "end host-2", "serve host-2 16384",
    ]  # fmt: skip
    assert made.change == ""
    assert made.plan.longest_request_tokens == 16384
    assert states(made) == {"host-1": "serving", "host-2": "serving"}


def test_the_next_node_changes_once_fronts_have_the_last_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = serving(world)
    monkeypatch.setattr(module, "_FRONTS_SECONDS", 3.0)
    heard: set[str] = set()
    made.has_front = lambda node: node.ray.name in heard
    target(made, context=16384)
    ticks(made, 20)
    assert states(made) == {"host-1": "starting", "host-2": "serving"}
    heard.add("host-1")
    world.now += 2
    ticks(made, 3)
    assert states(made) == {"host-1": "serving", "host-2": "serving"}
    world.now += 4
    ticks(made, 1)
    assert states(made) == {"host-1": "serving", "host-2": "draining"}


@pytest.mark.parametrize("failure", [("the engine died", 5), ("out of memory", 6)])
def test_the_first_node_that_fails_brings_the_old_plan_back_on_all(
    world: World, failure: tuple[str, int]
) -> None:
    made = serving(world, *["2xrtx3090"] * 3)
    before: ClusterPlan = made.plan
    world.log.clear()
    world.fails["host-2"] = failure
    target(made, context=16384)
    while "serve host-2 16384" not in world.log:
        made.tick()
    world.fails.clear()
    ticks(made, 12)
    assert [line for line in world.log if line.startswith("serve")] == [
        "serve host-1 16384", "serve host-2 16384", "serve host-2 32768", "serve host-1 32768",
    ]  # fmt: skip
    assert made.change == f"given up: node host-2-0002: {failure[0]}"
    assert (made.plan.limits, made.plan.verdict) == (before.limits, before.verdict)
    assert set(states(made).values()) == {"serving"}


def test_a_node_that_the_new_plan_left_out_joins_again_when_the_old_one_is_back(
    world: World,
) -> None:
    made = serving(world, "1xrtx3090:free=18500MiB", "2xrtx3090", context=8192)
    world.fails["host-2"] = ("the engine died", 5)
    target(made, context=32768)
    while "serve host-2 32768" not in world.log:
        made.tick()
    assert states(made)["host-1"] == "unfit"
    world.fails.clear()
    ticks(made, 12)
    assert made.change == "given up: node host-2-0002: the engine died"
    assert set(states(made).values()) == {"serving"}


def test_a_node_that_has_no_room_any_more_for_the_new_plan_brings_the_old_one_back(
    world: World,
) -> None:
    made = serving(world, "1xrtx3090", context=8192)
    target(made, context=32768)
    world.specs["host-1"] = node(1, "1xrtx3090:free=18500MiB")
    ticks(made, 10)
    assert made.change.startswith("given up: node host-1-0001: ")
    assert states(made) == {"host-1": "serving"}
    assert made.plan.longest_request_tokens == 8192


def test_a_change_does_not_count_on_a_node_that_is_drained(world: World) -> None:
    made = serving(world, "1xrtx3090:free=18500MiB", "2xrtx3090", context=8192)
    made.answer({"kind": "drain", "node": "host-2"})
    ticks(made)
    told = made.answer({"kind": "change", "keywords": {"context": 32768}})
    assert told["error"]["hint"].startswith("nothing has changed")
    target(made, context=4096)
    ticks(made, 10)
    assert states(made) == {"host-1": "serving", "host-2": "drained"}


def test_a_change_that_cannot_be_is_refused_and_changes_nothing(world: World) -> None:
    made = serving(world, "2xrtx3090")
    told = made.answer({"kind": "change", "keywords": {"margin": "23GiB"}})
    assert told["error"]["hint"].startswith("nothing has changed")
    target(made, context=16384)
    assert (
        "under way already" in made.answer({"kind": "change", "keywords": {}})["error"]["message"]
    )
    assert "nobody" in made.answer({"kind": "sing"})["error"]["message"]
    assert "no nodes are" in made.answer({"kind": "drain", "node": "x"})["error"]["message"]


def test_no_free_gpu_is_told_and_looked_at_again_soon(world: World) -> None:
    world.add(1, "2xrtx3090")
    late = world.add(2, "2xrtx3090")
    world.alive[late] = replace(world.alive[late], free=0)
    made = world.controller()
    ticks(made)
    assert "no GPU of it is free" in made.nodes[late].why
    world.alive[late] = replace(world.alive[late], free=2)
    world.now += 16
    ticks(made)
    assert states(made)["host-2"] == "serving"


class Stop:
    """A signal that comes once a node serves."""

    def __init__(self, come: Any = lambda: False) -> None:
        self.come, self.urgent, self.abrupt = come, False, True

    @property
    def signal(self) -> signal.Signals | None:
        return signal.SIGTERM if self.come() else None

    def rearm(self) -> None:
        """Nobody took it."""

    def on_second(self, strike: Any) -> None:
        """There is none."""


@pytest.fixture
def served(world: World, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`serve_cluster` on this world, until a signal."""
    monkeypatch.setattr(ray_adapter, "connected", lambda _: nullcontext(world))
    board = SimpleNamespace(post=Method(lambda *_: world.questions))
    monkeypatch.setattr(module, "pin_board", lambda *_: board)
    monkeypatch.setattr(module, "_POST_SECONDS", -1.0)
    gateway = GatewayConfig(port=0)

    def serve(stop: Stop, model: str = "internvl2-8b") -> list[str]:
        config = ClusterServeConfig(request=PlanRequest(model=model), gateway=gateway)
        said = world.said
        ended = module.serve_cluster(config, stop, say=said.append, on_open=said.extend)  # type: ignore[arg-type]
        assert ended is signal.SIGTERM
        return said

    return serve


def test_a_signal_ends_what_it_has_started_in_order(
    world: World, served: Any, tmp_path: Path
) -> None:
    world.add(1, "2xrtx3090")
    world.questions = {7: {"kind": "drain", "node": "nobody"}}
    stop = Stop(lambda: "serve host-1 32768" in world.log and list(tmp_path.rglob("*-state.json")))
    said = served(stop)
    assert world.log == ["serve host-1 32768", "end host-1", "free host-1"]
    assert said[-2:] == ["draining: what is under way may end", "stopping: SIGTERM"]
    assert not list(tmp_path.rglob("cluster-state.json"))


def test_a_signal_while_nodes_are_measured_is_no_lack_of_memory(
    world: World, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add(1, "2xrtx3090")
    monkeypatch.setattr(ray_adapter, "outcome", lambda *_: None)
    monkeypatch.setattr(Controller, "end", lambda *_: None)
    assert served(Stop(lambda: True))[-1] == "stopping: SIGTERM"


def test_what_cannot_be_served_gives_the_cards_back(world: World, served: Any) -> None:
    world.add(1, "1xt4")
    stop = Stop()
    with pytest.raises(DoesNotFitError, match="on none of 1 node") as caught:
        served(stop)
    assert "AWQ" in caught.value.hint
    assert not [line for line in world.said if line.startswith("draining")]
    assert world.log == ["free host-1"]
    assert stop.abrupt
