"""One turbofit with several models on the same cards, in virtual time: engines start and end."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from bench.simulation.clients import Request
from bench.simulation.commands import Turbofit, serve_question
from bench.simulation.gateway import SimulatedGatewayThread
from bench.simulation.invariants import Invariants
from bench.simulation.substitutes import in_place
from bench.simulation.world import Violation, World
from turbofit.core.errors import TurbofitError

if TYPE_CHECKING:
    from bench.simulation.engine import SimulatedEngine
    from turbofit.core.plan import Plan
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.models.models_gateway import ModelsGateway

__all__ = ["History", "Kind"]

#: A cache may be so many bytes off its plan: ratios are rounded.
_NOISE = 32 << 20


@dataclass
class ModelRequest(Request):
    """A request that names its model."""

    model: str = ""

    def payload(self) -> bytes:
        return json.dumps({**json.loads(super().payload()), "model": self.model}).encode()


class _App:
    """The address of several models, with what a gateway of one model has beside."""

    def __init__(self, front: ModelsGateway) -> None:
        self.front, self.config, self.connections = front, front.config, front.connections

    async def startup(self) -> None:
        return

    async def shutdown(self) -> None:
        await self.front.shutdown()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.front(scope, receive, send)


class Front(SimulatedGatewayThread):
    """The address in virtual time."""

    def __init__(self, world: World, front: ModelsGateway) -> None:
        super().__init__(world, _App(front))  # type: ignore[arg-type]
        self.front = front

    def call(self, ask: Any, seconds: float = 10.0) -> Any:
        return super().call(lambda _: ask(self.front), seconds)

    def gateways(self) -> dict[str, Gateway]:
        """By their models' names, those that are open."""
        return {
            name: model.gateway
            for name, model in self.front.models.items()
            if model.gateway is not None
        }

    def look(self) -> None:
        for gateway in self.gateways().values():
            if self._loop is not None and not self._ended.flag:
                self._loop.call_soon_threadsafe(gateway.monitor.look)


class SeveralInvariants(Invariants):
    """What must hold of engines of several models, beside what must hold of every engine."""

    def __init__(self, world: SeveralWorld) -> None:
        super().__init__(world)
        self._several = world
        #: By an engine, the others that served when it started; -1 where another one started.
        self._beside: dict[int, frozenset[int]] = {}
        #: And what they held of the card that is fullest of them.
        self._taken: dict[int, int] = {}

    def engine_started(self, engine: SimulatedEngine) -> None:
        """Never two engines of one model, and no more at once than may hold memory."""
        world = self._several
        running = [world.models[pid] for pid in world.machine.engines]
        if len(set(running)) < len(running):
            world.violate(f"two engines of one model: {running}")
        if len(running) > world.at_once:
            world.violate(f"{running} run at once, not {world.at_once}")
        self._beside[engine.pid] = self._settled(engine)
        self._taken[engine.pid] = self._taken_beside(engine)

    def cache_sized(self, engine: SimulatedEngine) -> None:
        """An engine takes its plan's cache, whatever is free, if nobody came or went meanwhile.

        It takes less where the others grow while it loads, within their parts of the card.
        """
        beside = self._beside[engine.pid]
        if -1 in beside or beside != self._settled(engine):
            return
        free = min(self._world.machine.cards[index].free for index in engine.gpus)
        more = int(free * engine.ratio) - engine.plan.kv.region_bytes
        grown = max(0, self._taken_beside(engine) - self._taken[engine.pid])
        if not -_NOISE - grown <= more <= _NOISE:
            name = self._several.models[engine.pid]
            self._world.violate(f"the cache of {name} is {more:+,} bytes off its plan")

    def _settled(self, engine: SimulatedEngine) -> frozenset[int]:
        others = [one for one in self._world.machine.engines.values() if one is not engine]
        return frozenset(one.pid if one.listening else -1 for one in others)

    def _taken_beside(self, engine: SimulatedEngine) -> int:
        """Bytes that other engines hold of an engine's cards; the most of one card."""
        cards = (self._world.machine.cards[index].held for index in engine.gpus)
        return max(sum(size for pid, size in held.items() if pid != engine.pid) for held in cards)

    def holds(self, engine: SimulatedEngine) -> None:
        """Units that are being encoded at one engine stay within its model's plan."""
        front = self._world.gateway
        if not isinstance(front, Front) or not front.serves(engine):
            return
        gateway = front.gateways().get(self._several.models[engine.pid])
        gate = None if gateway is None else gateway.bounds.gate
        units = sum(one.encoding for one in engine.exchanges)
        if gate is not None and units > gate:
            self._world.violate(f"engine {engine.pid} may encode {units} units, not {gate}")

    def _waited(self, request: Request) -> None:
        """Who waits for an engine is not told: other models' engines may be in its way."""

    def _all_given_back(self, sent: int, gateway: Any) -> None:
        """With no request open for a while, no model holds anything."""
        world = self._world
        if gateway is None or not gateway.alive or gateway is not world.gateway:
            return
        if len(world.requests) != sent:
            return
        for name, one in gateway.gateways().items():
            for engine in one.engines:
                reserved = 0 if engine.gate is None else engine.gate.reserved
                held = (engine.units, engine.host_bytes, engine.outstanding, reserved)
                if any(held):
                    world.violate(f"{name}: held though no request is open: {held}")
        for name, model in gateway.front.models.items():
            if model.in_flight or model.waiting or gateway.front.bodies_in_memory:
                world.violate(f"{name} has requests though none is open")


class SeveralWorld(World):
    """One history with several models.

    Args:
        seed: decides everything.
        spec: the cards.
        at_once: models that may hold memory at the same time.
    """

    def __init__(self, seed: int, spec: str, at_once: int) -> None:
        super().__init__(seed, spec)
        self.at_once = at_once
        self._model = ""
        self._last: dict[str, tuple[float, Plan]] = {}
        #: By its engine's process.
        self.models: dict[int, str] = {}
        self.invariants = SeveralInvariants(self)

    def start_engine(
        self, pid: int, argv: Sequence[str], env: Mapping[str, str]
    ) -> SimulatedEngine:
        self._model = self.models[pid] = argv[argv.index("--model-name") + 1]
        return super().start_engine(pid, argv, env)

    def plan_of(self, gpus: list[int], ratio: float) -> tuple[float, Plan]:
        """The newest plan of this model; its ratio is fitted to what is free."""
        del ratio
        process = self.scheduler.process
        plans = self.plans.get(process.pid, []) if process is not None else []
        for made, plan in reversed(plans):
            if plan.fits and plan.model.hub_id == self._model:
                self._last[self._model] = made, plan
                break
        made, plan = self._last[self._model]
        for group, members in enumerate(plan.parallel.groups):
            if list(members) == gpus:
                return made, plan.of_group(group)
        raise Violation(f"an engine of {self._model} was started on {gpus} by no plan")


#: Seconds between two looks of the server of models, which looks ten times a second in use.
_TICK = 0.5


@dataclass(frozen=True)
class Kind:
    """What a history is made of.

    ``pause`` are seconds between two requests, on average; ``faults`` deaths of engines, an hour.
    """

    models: tuple[str, ...]
    spec: str
    options: dict[str, Any]
    fixed: dict[str, Any] = field(default_factory=dict)
    at_once: int = 1
    pause: float = 20.0
    faults: float = 0.0


class _Server(Turbofit):
    """`turbofit serve A B C`."""

    def __init__(self, history: History) -> None:
        super().__init__(history, history.kind.models[0], history.kind.fixed)  # type: ignore[arg-type]
        self._history = history

    def _command(self, stop: Any) -> Any:
        from turbofit.cli.options.models_options import ModelsOptions
        from turbofit.cli.serving.serve_models import PlannedModel, planned_models, serve_models
        from turbofit.cli.serving.serve_plan import preview

        kind = self._history.kind
        arguments, config = serve_question(self._model, tuple(self._fixed.items()))
        options = ModelsOptions(**kind.options)
        if len(kind.models) > 1:
            each: list[dict[str, Any]] = [{"model": name} for name in kind.models]
            shares = (1.0,) * len(each)
            planned, at_once = planned_models(arguments, config, each, shares, options)
        else:
            planned, at_once = [PlannedModel(arguments, config, preview(arguments, config))], 1
        self._history.names = [one.name for one in planned]
        if at_once != kind.at_once:
            self._history.world.violate(f"{at_once} run at once, not {kind.at_once}")
        return serve_models(planned, options, at_once, stop)

    def _failed(self, error: TurbofitError) -> None:
        self._history.world.violate(f"error: {error.message} | {error.hint}")


class History:
    """One server of several models, its clients, and its faults.

    Args:
        seed: decides everything.
        kind: what it is made of.
        starts: engines' starts after which it ends.
    """

    def __init__(self, seed: int, kind: Kind, starts: int) -> None:
        self.rng, self.kind, self.starts = random.Random(seed), kind, starts
        self.world = SeveralWorld(seed, kind.spec, kind.at_once)
        self.names: Sequence[str] = ()

    def ended(self) -> None:
        """The server ended: only this history may end it."""
        if self.names:
            self.world.violate("the server ended by itself")

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        self.world.scheduler.after(seconds, act)

    def _ask(self) -> None:
        """A client's request, and the next one's time."""
        world, rng = self.world, self.rng
        if self.names and world.gateway is not None and world.gateway.listens:
            one = ModelRequest(
                number=len(world.requests), client=f"10.0.0.{rng.randrange(20)}",
                images=((896, 896),) * rng.randrange(2), stream=rng.random() < 0.5,
                tokens=rng.randrange(1, 6), model=rng.choice(list(self.names)),
                leaves=rng.choice((None,) * 9 + (2.0,)),
            )  # fmt: skip
            world.send(one)
        self.later(rng.expovariate(1 / self.kind.pause), self._ask)

    def _fault(self) -> None:
        """An engine dies of itself."""
        engines = [one for one in self.world.machine.engines.values() if one.listening]
        if engines:
            self.rng.choice(engines).crash()
        self.later(self.rng.expovariate(self.kind.faults / 3600), self._fault)

    def run(self) -> list[str]:
        """What was violated until there were so many starts, and the server ended in order."""
        world, scheduler = self.world, self.world.scheduler
        server = _Server(self)
        with in_place(world), patch(
            "turbofit.gateway.thread.GatewayThread", partial(Front, world)
        ), patch(
            "turbofit.launch.models.models_server.ModelsServer._pause",
            lambda _: scheduler.sleep(_TICK),
        ):  # fmt: skip
            server.start()
            self.later(1.0, self._ask)
            if self.kind.faults:
                self.later(600.0, self._fault)
            while world.counts.get("engine starts", 0) < self.starts and not world.violations:
                scheduler.run(scheduler.now + 600)
            self._close(server)
            return list(world.violations)

    def _close(self, server: _Server) -> None:
        """Nobody asks any more; it ends in order, and leaves nothing."""
        world, scheduler = self.world, self.world.scheduler
        self.names = ()
        scheduler.run(scheduler.now + 900)
        server.signal(signal.SIGTERM)
        scheduler.run(scheduler.now + 180)
        if server.alive:
            world.violate("it did not end within 180 s of SIGTERM")
        world.invariants.nothing_left(server.process)
        for one in world.requests:
            if one.end not in ("200", "left") and not self.kind.faults:
                world.violate(f"request {one.number} ended with {one.end}: {one.body[:1]!r}")
