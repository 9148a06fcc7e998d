"""A model on a simulated Ray cluster, for some hours: ``bench.simulation.run --cluster``.

The controller of `turbofit serve --cluster` runs, with its nodes, GPUs, replicas, changes of plan
and the commands of people. Ray, engines, gateways and time are simulated. The last part of a
history is without faults: every node must serve again at its end, and nothing be left after it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from turbofit.launch.cluster.node_state import NodeState
from turbofit.launch.cluster.places import Places

from bench.simulation.cluster_gateways import CoordinatorActor, ExtraGateway
from bench.simulation.cluster_world import (
    ClusterWorld,
    SimulatedConnection,
    cluster_in_place,
    planned,
)
from bench.simulation.history import Result
from bench.simulation.ray import Actor, RayMachine
from bench.simulation.scheduler import Process
from turbofit.core.cluster import Cluster
from turbofit.core.errors import TurbofitError
from turbofit.gateway.config import GatewayConfig
from turbofit.launch.cluster import run
from turbofit.launch.cluster.controller import Controller
from turbofit.launch.cluster.nodes import held_only, tell_nodes
from turbofit.launch.engine.supervised_engine import Timing
from turbofit.launch.serve.config import ClusterServeConfig
from turbofit.launch.serve.supervisor import StopSignal
from turbofit.machine.spec import parse_spec
from turbofit.planning.request import PlanRequest

__all__ = ["simulate_cluster"]

HOURS = 6.0
#: The last seconds: longer than a node that could not serve waits until it is looked at again,
#: and than a drain, twice.
CALM = 3_600.0
_LEAST_FAULTS, _MOST_FAULTS = 15, 25
_MOST_TICKS = 100_000
_SPECS = ("1xrtx3090", "2xrtx3090", "1xrtx4090", "4xrtx3090")
_CONTEXTS = (4096, 8192, 16384)


class _Run(run._Run):
    """What turbofit does from its plan on, with looks at what must hold."""

    def __init__(
        self, scenario: ClusterScenario, config: ClusterServeConfig, controller: Controller,
        coordinator: CoordinatorActor,
    ) -> None:  # fmt: skip
        super().__init__(
            config, controller, coordinator, Path("unwritten"), scenario.world.trace, lambda _: None
        )
        self._scenario, self._looks = scenario, 0

    def _publish(self) -> None:
        super()._publish()
        self._looks += 1
        if self._looks == _MOST_TICKS:
            self._scenario.world.violate(f"{self._looks:,} looks")
        self._scenario.check_table(self._controller)

    def _end(self, stop: StopSignal, *, failed: bool) -> None:
        if failed:
            self._scenario.check_failure(self._controller)
        self._scenario.world.ending = True
        super()._end(stop, failed=failed)


class ClusterScenario:
    """One history."""

    def __init__(self, seed: int) -> None:
        self.world = world = ClusterWorld(seed)
        self.rng = world.rng
        self.over = False
        self._stop = StopSignal()
        self.controller: Controller | None = None
        self.connection = SimulatedConnection(world)
        self.process: Process | None = None
        #: Of a node: not all of its GPUs are used in some histories.
        self._replicas = self.rng.choice((None, None, 1))
        #: Gateways that there may be; those beside turbofit's that run.
        self.places = self.rng.choice((1, 2, 3))
        self.gateways: list[ExtraGateway] = []
        self.joined = 0
        self.drained: set[str] = set()
        for _ in range(self.rng.randrange(2, 5)):
            self.join()

    def run(self) -> Result:
        world, scheduler = self.world, self.world.scheduler
        with cluster_in_place(world):
            begin = scheduler.now
            end = begin + HOURS * 3600.0
            self.start()
            for _ in range(self.places - 1):
                scheduler.after(self.rng.uniform(0.0, 300.0), self._keep_gateway)
            for _ in range(self.rng.randrange(_LEAST_FAULTS, _MOST_FAULTS)):
                at = begin + self.rng.uniform(1.0, HOURS * 3600.0 - CALM)
                for _ in range(self.rng.choice((1, 1, 2))):
                    scheduler.at(at, self._fault)
                    at += self.rng.choice((0.0, self.rng.uniform(0, 2), self.rng.uniform(0, 60)))
            scheduler.at(end - CALM, self._calm)
            scheduler.run(end)
            self._check()
            self.over = True
            self.stop()
            world.ray.stir()
            scheduler.run(end + 600.0)
            if self.process is not None and self.process.alive:
                world.violate("turbofit did not end within ten minutes")
            left = [one.spec.name for one in world.ray.actors]
            if left or world.ray.groups:
                world.violate(f"engines {left} and {len(world.ray.groups)} groups are left")
            result = world.result()
            scheduler.discard_threads()
            return result

    # -- turbofit

    def start(self) -> None:
        if self.over:
            return
        self._stop = StopSignal()
        self.process = Process(self.world.new_pid())
        self.connection = SimulatedConnection(self.world)
        self.world.trace(f"turbofit {self.process.pid} starts")
        self.world.scheduler.thread(self._serve, self.process)

    def _serve(self) -> None:
        world, process = self.world, self.process
        assert process is not None
        try:
            self._follow()
        except TurbofitError as exc:
            world.trace(f"error: {exc.message} | {exc.hint}")
        self.controller = None
        self._disconnect()
        world.trace(f"turbofit {process.pid} ends")
        world.scheduler.end(process)
        world.scheduler.after(self.rng.uniform(5.0, 300.0), self.start)

    def _follow(self) -> None:
        world, connection, places = self.world, self.connection, Places()
        alive = connection.watched()
        places.take([one.id for one in alive.values() if one.gpus and not one.leaving])
        told = tell_nodes(alive.values(), pretend=False)
        nodes = tuple(held_only(node, places.on(node.id)) for node in told)
        config = _config(self._replicas, self.places)
        plan = planned(config.request, Cluster(source="simulated", nodes=nodes))
        world.trace(plan.verdict)
        if not plan.fits:
            return
        states = [NodeState(node) for node in nodes if alive[node.id].gpus]
        self.controller = controller = Controller(
            connection, places, plan, states, config, world.trace, name="it"  # type: ignore[arg-type]
        )  # fmt: skip
        controller.gateways = config.gateways
        world.coordinator = coordinator = CoordinatorActor(world)
        world.ending = False
        _Run(self, config, controller, coordinator).follow(self._stop)

    # -- what must hold

    def check_table(self, controller: Controller) -> None:
        """Requests are held to what every engine that gets new ones keeps."""
        names: set[str] = set()
        for state in controller.node_states.values():
            for replica in state.replicas:
                member = replica.member()
                if member is None:
                    continue
                if member.name in names:
                    self.world.violate(f"two engines are {member.name}")
                names.add(member.name)
                keeps = replica.engine_spec.plan.kv.longest_request_tokens
                asked = controller.bounds.longest_request_tokens
                if not member.draining and keeps < asked:
                    self.world.violate(f"{member.name} keeps {keeps} tokens, not {asked}")

    def check_failure(self, controller: Controller) -> None:
        """It may give up only where no engine that it knows serves."""
        ready = {
            one.spec.name for one in self.world.ray.actors
            if one.runs and one.state.state == "ready"
        }  # fmt: skip
        known = {
            replica.engine_spec.name
            for state in controller.node_states.values()
            for replica in state.replicas
            if not replica.actor_lost
        }
        if ready & known:
            self.world.violate(f"turbofit ends though {len(ready)} engines serve")

    def _check(self) -> None:
        """Every node serves with all that is planned for it, and holds nothing else."""
        world, controller = self.world, self.controller
        if controller is None:
            world.violate("an hour after the last fault nothing is served")
            return
        if controller.changing:
            world.violate(f"an hour after the last fault a change goes on: {controller.change}")
        for node in world.ray.machines.values():
            state = controller.node_states.get(node.id)
            held = set(controller.places.on(node.id))
            if state is None:
                world.violate(f"nobody knows {node.name}")
            elif state.state == "drained":
                if held or state.replicas or node.name not in self.drained:
                    world.violate(f"{node.name} is drained and holds {held}")
            elif not state.ready or state.state != "serving":
                world.violate(f"{node.name} is {state.state}: {state.why_not or state.failed}")
            elif state.promised is not controller.plan:
                world.violate(f"{node.name} serves another plan than the cluster's")
            elif held != {str(index) for index in state.plan.gpus()}:
                world.violate(f"{node.name} holds {held}, and its plan is for {state.plan.gpus()}")
        gone = set(controller.node_states) - set(world.ray.machines)
        if gone:
            world.violate(f"{len(gone)} nodes are gone and known")

    # -- what happens

    def join(self) -> None:
        """A node comes; one that was there before has another id."""
        self.joined += 1
        number = self.joined
        spec = self.rng.choice(_SPECS)
        node = RayMachine(f"{number:08x}", f"n{number}", parse_spec(spec))
        self.world.ray.machines[node.id] = node
        self.world.trace(f"{node.name} joins with {spec}")
        self.world.ray.stir()

    def _fault(self) -> None:
        name = self.rng.choice(sorted(_FAULTS))
        self.world.trace(f"fault {name}")
        self.world.count(f"fault {name}")
        _FAULTS[name](self)
        self.world.ray.stir()

    def node(self) -> RayMachine | None:
        """One of those that are there."""
        found = list(self.world.ray.machines.values())
        return self.rng.choice(found) if found else None

    def actor(self) -> Actor | None:
        found = self.world.ray.actors
        return self.rng.choice(found) if found else None

    def command(self, **document: Any) -> None:
        """What a person asks."""
        if self.world.coordinator is not None:
            self.world.coordinator.ask.remote(document, 60.0)  # type: ignore[attr-defined]

    def kill(self) -> None:
        """SIGKILL."""
        process, world = self.process, self.world
        if process is None or not process.alive:
            return
        self.controller = None
        world.scheduler.end(process)
        self._disconnect()
        world.scheduler.after(self.rng.uniform(5.0, 300.0), self.start)

    def _disconnect(self) -> None:
        """What was connected to Ray ends, and what it started there."""
        if self.world.coordinator is not None:
            self.world.coordinator.die()
        self.world.coordinator = None
        self.world.ray.disconnect()

    def stop(self) -> None:
        """SIGTERM."""
        self._stop.end()

    def gateway_comes(self) -> None:
        """Somebody starts `turbofit gateway`; perhaps there is no place."""
        if self.world.coordinator is not None:
            self.gateways.append(ExtraGateway(self.world, self.world.coordinator))

    def _keep_gateway(self) -> None:
        """A gateway with a service manager: however it ends, it is started again."""
        pause, scheduler = self.rng.uniform(5.0, 300.0), self.world.scheduler
        again = partial(scheduler.after, pause, self._keep_gateway)
        if self.over:
            return
        if self.world.coordinator is None:
            again()
            return
        self.gateway_comes()
        self.gateways[-1].process.ends.append(again)

    def gateway(self) -> ExtraGateway | None:
        """One of those that run beside turbofit's."""
        self.gateways = [one for one in self.gateways if one.process.alive]
        return self.rng.choice(self.gateways) if self.gateways else None

    def drain(self) -> None:
        node = self.node()
        if node is not None and len(self.world.ray.machines) > 1:
            self.drained.add(node.name)
            self.command(kind="drain", node=node.name)

    def leave(self) -> None:
        """Ray drains a node, which dies soon."""
        node, world = self.node(), self.world
        if node is None or len(world.ray.machines) < 2:
            return
        node.leaving = True
        world.scheduler.after(
            self.rng.uniform(10.0, 600.0),
            lambda: world.ray.lose(node) if node.alive else None,
        )

    def _calm(self) -> None:
        world = self.world
        world.trace("calm")
        world.failing = 0
        self.connection.silent_until = 0.0
        for node in list(world.ray.machines.values()):
            node.measuring = 1.0
            node.taken = {gpu: group for gpu, group in node.taken.items() if group is not None}
            if node.leaving:
                world.ray.lose(node)
        if not world.ray.machines:
            self.join()
        world.ray.give()
        world.ray.stir()


def _die(scenario: ClusterScenario) -> None:
    node = scenario.node()
    if node is not None:
        scenario.world.ray.lose(node)
        scenario.world.scheduler.after(scenario.rng.uniform(30.0, 1200.0), scenario.join)


def _job(scenario: ClusterScenario) -> None:
    """Another job takes what is free."""
    node = scenario.node()
    for gpu in scenario.world.ray.free(node) if node is not None else ():
        assert node is not None
        node.taken[gpu] = None


def _jobs_end(scenario: ClusterScenario) -> None:
    for node in scenario.world.ray.machines.values():
        node.taken = {gpu: group for gpu, group in node.taken.items() if group is not None}
    scenario.world.ray.give()


def _slow(scenario: ClusterScenario) -> None:
    node = scenario.node()
    if node is not None:
        node.measuring = scenario.rng.uniform(30.0, 200.0)


def _silent(scenario: ClusterScenario) -> None:
    seconds = scenario.rng.uniform(1.0, 40.0)
    scenario.connection.silent_until = scenario.world.scheduler.now + seconds


def _fail(scenario: ClusterScenario) -> None:
    scenario.world.failing += scenario.rng.randrange(2, 5)


def _change(scenario: ClusterScenario) -> None:
    """Somebody wants another plan; a node may join meanwhile, or engines not start under it."""
    if scenario.rng.random() < 0.3:
        scenario.join()
    scenario.command(kind="change", keywords={"context": scenario.rng.choice(_CONTEXTS)})
    if scenario.rng.random() < 0.3:
        _fail(scenario)


def _join_drained(scenario: ClusterScenario) -> None:
    """A node joins, and somebody drains it while it is measured."""
    scenario.join()
    name = f"n{scenario.joined}"
    scenario.drained.add(name)
    scenario.world.scheduler.after(
        scenario.rng.uniform(0.5, 5.0), lambda: scenario.command(kind="drain", node=name)
    )


def _each(act: Callable[[Actor], None]) -> Callable[[ClusterScenario], None]:
    def happen(scenario: ClusterScenario) -> None:
        actor = scenario.actor()
        if actor is not None:
            act(actor)

    return happen


def _gateway(act: Callable[[ExtraGateway], None]) -> Callable[[ClusterScenario], None]:
    def happen(scenario: ClusterScenario) -> None:
        gateway = scenario.gateway()
        if gateway is None:
            scenario.gateway_comes()
        else:
            act(gateway)

    return happen


def _silence(scenario: ClusterScenario) -> None:
    """A gateway is not heard, nor told anything, while engines are to end."""
    gateway, scheduler, rng = scenario.gateway(), scenario.world.scheduler, scenario.rng
    if gateway is None:
        scenario.gateway_comes()
        return
    gateway.silent_until = scheduler.now + rng.uniform(10.0, 400.0)
    scheduler.after(
        rng.uniform(0.0, 30.0),
        partial(rng.choice((ClusterScenario.drain, ClusterScenario.leave, _change)), scenario),
    )


def _lose_coordinator(scenario: ClusterScenario) -> None:
    if scenario.world.coordinator is not None:
        scenario.world.coordinator.end_process()


_FAULTS: dict[str, Callable[[ClusterScenario], None]] = {
    "node dies": _die,
    "node joins": ClusterScenario.join,
    "node leaves": ClusterScenario.leave,
    "node is drained": ClusterScenario.drain,
    "node is slow": _slow,
    "other job": _job,
    "other jobs end": _jobs_end,
    "head is silent": _silent,
    "engines fail at their start": _fail,
    "engine fails": _each(Actor.fail),
    "actor's process dies": _each(Actor.end_process),
    "actor dies": _each(lambda actor: actor.die("simulated")),
    "change of plan": _change,
    "node is drained while it joins": _join_drained,
    "gateway comes": ClusterScenario.gateway_comes,
    "gateway is killed": _gateway(ExtraGateway.kill),
    "gateway is stopped": _gateway(ExtraGateway.stop),
    "gateway is silent": _silence,
    "coordinator's process dies": _lose_coordinator,
    "turbofit is killed": ClusterScenario.kill,
    "turbofit is stopped": ClusterScenario.stop,
}


@cache
def _config(replicas: int | None, gateways: int) -> ClusterServeConfig:
    request = PlanRequest(model="internvl2-2b", context=8192, replicas=replicas)
    return ClusterServeConfig(
        model_name="m",
        request=request,
        rehearse=False,
        gateway=GatewayConfig(),
        gateways=gateways,
        access_log="none",
        timing=Timing(drain=10 * Timing().drain),
    )


def simulate_cluster(seed: int) -> Result:
    """The history of a seed."""
    return ClusterScenario(seed).run()
